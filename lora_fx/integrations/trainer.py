"""Adapter-only checkpoints of the transformers Trainer, for models that are not transformers'.

    trainer = Trainer(tuned, arguments, train_dataset=data, callbacks=[AdapterCheckpoints()])

An adapted transformers model writes such checkpoints by itself (`integrations.pretrained`); of any other module the
Trainer writes the whole state dict.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fx.integrations.pretrained import write_checkpoint


class AdapterCheckpoints(TrainerCallback):
    """Lets a Trainer's checkpoints hold what is trained, and the buffers, but nothing of the frozen base."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written."""
        if state.is_world_process_zero:
            write_checkpoint(model, Path(str(args.output_dir), f"checkpoint-{state.global_step}"))
