"""Adapter-only checkpoints of the transformers Trainer.

    trainer = Trainer(tuned, arguments, train_dataset=data, callbacks=[AdapterCheckpoints()])

The Trainer itself works with an adapted model as with any other, but each of its checkpoints holds the whole base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fx.files.adapter.write import save
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors

_WEIGHTS = "model.safetensors"
_CONFIGURATION = "config.json"


class AdapterCheckpoints(TrainerCallback):
    """Lets a Trainer's checkpoints hold what is trained, and the buffers, but nothing of the frozen base.

    `lora_fx.load(model, ".../checkpoint-N")` reads such a checkpoint, and so does PEFT.  The Trainer resumes from it,
    and loads the best of them at the end: it finds the trained tensors under their own keys in `model.safetensors`
    (also where `save_pretrained` would rename them, and the Trainer then silently resume without).  `config.json` is
    left out, since `from_pretrained` would take the folder for a whole model.
    """

    def __init__(self) -> None:
        self._ignored: Any = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Let the model's `save_pretrained` leave the base out: it need not be written to be deleted again."""
        if isinstance(model, PreTrainedModel):
            self._ignored = model._keys_to_ignore_on_save
            model._keys_to_ignore_on_save = sorted(frozen_keys(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Let `save_pretrained` save the whole model again."""
        if isinstance(model, PreTrainedModel):
            model._keys_to_ignore_on_save = self._ignored

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written."""
        if state.is_world_process_zero:
            write_checkpoint(model, Path(str(args.output_dir), f"checkpoint-{state.global_step}"))


def write_checkpoint(tuned: nn.Module, folder: Path) -> None:
    """Write the adapter in PEFT's format, and all that is not frozen as `model.safetensors`, in place of the model."""
    save(tuned, folder)
    write_files({folder / _WEIGHTS: canonical_safetensors(trained_tensors(tuned), {"format": "pt"})})
    (folder / _CONFIGURATION).unlink(missing_ok=True)


def trained_tensors(tuned: nn.Module) -> dict[str, Tensor]:
    """Return the entries of the state dict that training may change, each tensor once and contiguous."""
    frozen = frozen_keys(tuned)
    names: dict[int, str] = {}
    state = tuned.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name not in frozen:
            names.setdefault(id(tensor), name)
    return {name: state[name].detach().contiguous() for name in names.values()}


def frozen_keys(tuned: nn.Module) -> set[str]:
    """Return the keys of the parameters that require no gradient."""
    return {name for name, p in tuned.named_parameters(remove_duplicate=False) if not p.requires_grad}
