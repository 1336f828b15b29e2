"""Callbacks of the transformers Trainer: adapter-only checkpoints for models of any kind, and records of training.

    callbacks = [AdapterCheckpoints(), RecordTraining("run.jsonl")]
    trainer = Trainer(tuned, arguments, train_dataset=data, callbacks=callbacks)

An adapted transformers model writes such checkpoints by itself (`integrations.pretrained`); of any other module the
Trainer writes the whole state dict.
"""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fx.integrations.pretrained import write_checkpoint
from lora_fx.models.fsdp import has_parts
from lora_fx.training.recorder import Recorder

_IGNORED = "_keys_to_ignore_on_save"


class AdapterCheckpoints(TrainerCallback):
    """Lets a Trainer's checkpoints hold what is trained, and the buffers, but nothing of the frozen base."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Let the Trainer load a checkpoint that lacks the base into a model that is not transformers'.

        It asks the model for this attribute as soon as a key is missing, and fails where there is none.
        """
        if isinstance(model, nn.Module) and getattr(model, _IGNORED, _IGNORED) is _IGNORED:
            setattr(model, _IGNORED, None)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written; every process has its shards."""
        if state.is_world_process_zero or has_parts(model):
            write_checkpoint(model, Path(str(args.output_dir), f"checkpoint-{state.global_step}"))


class RecordTraining(TrainerCallback):
    """Writes a record of the training, as `lora_fx.Recorder` does: a line whenever the Trainer logs a loss.

    So `logging_steps` says how often.  The loss is the one that is logged: the mean over the steps since the last log,
    of all processes.  By default the Trainer logs in place of a loss that is NaN or infinite the mean of those before
    (`logging_nan_inf_filter`); ‖ΔW‖, which is not filtered, shows it even then.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._recorder: Recorder | None = None
        self._logged = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Look at the model and at a file of an earlier part; both must fit, or the training does not begin."""
        self._recorder = Recorder(model, self.path, every=1)
        self._logged = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write a line for a loss that is logged, and one without for the last step if none was."""
        over = state.global_step - self._logged
        if self._recorder is None or over < 1 or not {"loss", "train_loss"} & (logs or {}).keys():
            return  # of an evaluation, or the user's own
        self._recorder.step(logs.get("loss"), state.global_step, over)
        self._logged = state.global_step
