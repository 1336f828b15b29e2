"""Callbacks of Lightning: checkpoints without the frozen base, and records of training.

    trainer = lightning.Trainer(callbacks=[LightningAdapterCheckpoints(), LightningRecorder("run.jsonl")])

The adapted model may be the LightningModule itself or a part of it.
"""

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.placed import placed_in
from lora_fx.adapters.tokenrows import IDS
from lora_fx.errors import AdapterMismatchError, RefusedError
from lora_fx.files.fingerprint import same_values, sample_values
from lora_fx.training.recorder import Recorder
from lora_fx.tuned.build import held

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError("lora_fx.integrations.lightning needs Lightning: pip install 'lora-fx[lightning]'") from error

_NOTE = "lora_fx"
"""Key of a checkpoint: values of the base by which it is known again."""


class LightningRecorder(Callback):
    """Writes a record of the training, as `lora_fx.Recorder` does: the loss that `training_step` returns.

    With `accumulate_grad_batches` the loss of a step is the mean over its batches, of which the last step of an epoch
    may have fewer.  In manual optimisation it is what `training_step` returns for the last batch before the step, if it
    returns a loss.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 10) -> None:
        super().__init__()
        self.path, self.every = path, every
        self._recorder: Recorder | None = None
        self._loss: Tensor | float | None = None
        self._batches = 0
        self._step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the model and at a file of an earlier part; both must fit, or the training does not begin."""
        self._recorder = Recorder(pl_module, self.path, self.every)
        self._start_step(trainer)

    def _start_step(self, trainer: Any) -> None:
        self._loss, self._batches, self._step = None, 0, trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss, and write a line if it is time."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, (Tensor, float, int)):
            loss = None
        if loss is not None and pl_module.automatic_optimization:
            whole = loss * trainer.accumulate_grad_batches  # by which each is divided, however many there are
            self._loss = whole if self._loss is None else self._loss + whole
            self._batches += 1
        elif loss is not None:
            self._loss, self._batches = loss, 1
        if self._recorder is not None and trainer.global_step > self._step:
            self._recorder.step(None if self._loss is None else self._loss / self._batches, trainer.global_step)
            self._start_step(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last step."""
        if self._recorder is not None:
            self._recorder.write()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the last step, so that the record ends where the run did."""
        if self._recorder is not None:
            self._recorder.__exit__(type(exception), exception, None)


class LightningAdapterCheckpoints(Callback):
    """Lets a Trainer's checkpoints hold what is trained, and the buffers, but nothing of the frozen base.

    A training resumes from them as from others, with the state of its optimizers; another base than theirs is refused.
    What no adapted model holds is kept whole.  `load_adapter_checkpoint` reads one outside of a Trainer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handle: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the module read checkpoints without a base.

        Raises:
            RefusedError: checkpoints would hold the base all the same, or be read in another way.
        """
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup:
            raise RefusedError(
                f"{type(strategy).__name__} writes and reads checkpoints in its own way, with the frozen base",
                advice="leave out LightningAdapterCheckpoints, or train with DDP",
            )
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            raise RefusedError(
                "ModelCheckpoint(save_weights_only=True) asks no callback what to write: the base would be in it",
                advice="leave out save_weights_only; the optimizer's state is small, it is that of the adapters",
            )
        base_of(pl_module)
        self._handle = pl_module.register_load_state_dict_pre_hook(_fill_base)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the module be as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: MutableMapping[str, Any]) -> None:
        """Take the frozen base out of a checkpoint before it is written, in place."""
        base = base_of(pl_module)
        for name in base:
            checkpoint["state_dict"].pop(name, None)
        noted = {name: sample_values(weight) for name, weight in base.items()}
        checkpoint[_NOTE] = {"schema_version": 1, "base": noted}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Check that a checkpoint belongs to this base; AdapterMismatchError otherwise, before anything is trained."""
        _check_base(pl_module, checkpoint)


def base_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the frozen weights of the adapted models in a module by their names in its state dict.

    Other frozen parameters that share their memory with them (the reference model of DPO) are among them.

    Raises:
        RefusedError: nothing in it is adapted.
    """
    mine, places = {id(parameter) for parameter in held(module)}, placed_in(module)
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name: p for name, p in named if not p.requires_grad and id(p) not in mine}
    inside = {name for name in frozen if any(place.recorded(name) is not None for place in places)}
    memory = {_memory(frozen[name]) for name in inside} - {0}
    return {name: p for name, p in frozen.items() if name in inside or _memory(p) in memory}


def _memory(parameter: Tensor) -> int:
    """Return where a plain parameter has its memory; 0 for what is no plain tensor, or has none."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return parameter.untyped_storage().data_ptr() if plain else 0


def _fill_base(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Put the module's own base into a state dict that has nothing of it."""
    base = base_of(module)
    if not any(prefix + name in state for name in base):
        state.update({prefix + name: weight for name, weight in base.items()})


def _check_base(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    note = checkpoint.get(_NOTE)
    if note is None:  # with its base: all of it was loaded
        return
    noted, base = note["base"], base_of(module)
    wrong = [
        (name, "has none" if name not in noted else "other values", "has none" if name not in base else "other values")
        for name in {**noted, **base}
        if name not in noted or name not in base or not same_values(noted[name], sample_values(base[name]))
    ]
    if wrong:
        advice = "give the base on which the checkpoint's adapters were trained"
        raise AdapterMismatchError("the checkpoint is of another base", wrong, advice)


def load_adapter_checkpoint(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what a checkpoint of LightningAdapterCheckpoints holds into a module, in place: all or nothing.

    Args:
        module: a LightningModule adapted alike.
        path: of the checkpoint; nothing but tensors and plain values is read from it.

    Raises:
        AdapterMismatchError: it is of another base, or names and shapes are not those of the module.
        RefusedError: nothing in the module is adapted.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    _check_base(module, checkpoint)
    state = dict(checkpoint["state_dict"])
    _fill_base(module, state, "")
    own = module.state_dict()
    pairs = ((name, _told(name, state.get(name)), _told(name, own.get(name))) for name in {**own, **state})
    if wrong := [(name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]:
        raise AdapterMismatchError("the checkpoint does not fit this module", wrong, "nothing was loaded")
    module.load_state_dict(state)


def _told(name: str, value: object) -> str:
    if name.endswith(IDS) and isinstance(value, Tensor):
        return f"tokens {value.tolist()}"
    return f"{list(value.shape)}" if isinstance(value, Tensor) else "has none" if value is None else "no tensor"
