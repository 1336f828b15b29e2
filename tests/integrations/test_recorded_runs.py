"""Records of one training: the same from a plain loop and the transformers Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

import lora_fx
from lora_fx.integrations.trainer import AdapterCheckpoints, RecordTraining
from lora_fx.training.lines import RecordFileError
from tests.integrations.test_trainer import Interrupt
from tests.support import runs
from tests.support.runs import assert_alike, plain

pytestmark = [pytest.mark.filterwarnings("ignore")]  # those of the Trainer itself


class WithLoss(nn.Module):
    """Calls a model as the Trainer wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        result = self.model(x)
        return {"loss": (result - labels).square().mean(), "found": result}


def trainer(tuned: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    data = [{"x": x, "labels": y} for batch in runs.batches() for x, y in zip(*batch, strict=True)]
    arguments = TrainingArguments(**{
        "output_dir": str(folder), "max_steps": runs.STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "lr_scheduler_type": "constant", "logging_steps": 5, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0, "train_sampling_strategy": "sequential", **options,
    })  # fmt: skip
    return Trainer(
        WithLoss(tuned),
        arguments,
        train_dataset=data,
        callbacks=[*callbacks],
        optimizers=(runs.optimizer_of(tuned), None),
    )


def test_trainer_writes_what_a_plain_loop_writes(tmp_path):
    trainer(runs.adapted(), tmp_path, RecordTraining(tmp_path / "trainer.jsonl"), logging_steps=4).train()
    assert_alike(lora_fx.read_record(tmp_path / "trainer.jsonl"), plain(tmp_path / "plain.jsonl", 4))


def test_last_step_of_a_trainer_that_has_not_logged_it_has_norms_and_no_loss(tmp_path):
    trainer(runs.adapted(), tmp_path, RecordTraining(tmp_path / "trainer.jsonl")).train()
    record, other = lora_fx.read_record(tmp_path / "trainer.jsonl"), plain(tmp_path / "plain.jsonl")
    assert [(line.step, line.mean_of) for line in record.steps] == [(5, 5), (10, 5), (12, 0)]
    assert record.steps[-1].loss is None
    assert list(record.steps[-1].norms) == pytest.approx(list(other.steps[-1].norms), rel=1e-4)


def test_trainer_that_goes_on_appends_to_its_record(tmp_path):
    options = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 4}

    def one(*callbacks: Any) -> Trainer:
        parts = [RecordTraining(tmp_path / "run.jsonl"), AdapterCheckpoints(), *callbacks]
        return trainer(runs.adapted(), tmp_path / "checkpoints", *parts, **options)

    one(Interrupt(6)).train()
    one().train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-4"))
    record = lora_fx.read_record(tmp_path / "run.jsonl")
    assert record.replaced == 1
    assert_alike(
        lora_fx.TrainingRecord(record.model, record.lora_fx, record.sites, record.steps),
        plain(tmp_path / "plain.jsonl", 2),
    )


def test_a_trainer_alone_cannot_load_a_checkpoint_without_base_into_a_model_that_is_not_transformers(tmp_path):
    class Bare(AdapterCheckpoints):
        def on_init_end(self, *_: Any, **__: Any) -> None:
            """Leave the model as it is."""

    options = {"save_strategy": "steps", "save_steps": 4}
    trainer(runs.adapted(), tmp_path, Bare(), **options).train()
    with pytest.raises(AttributeError, match="_keys_to_ignore_on_save"):
        trainer(runs.adapted(), tmp_path, Bare(), **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_new_training_into_the_file_of_an_old_one_does_not_begin(tmp_path):
    trainer(runs.adapted(), tmp_path, RecordTraining(tmp_path / "run.jsonl")).train()
    tuned = runs.adapted()
    with pytest.raises(RecordFileError, match="a file of its own"):
        trainer(tuned, tmp_path, RecordTraining(tmp_path / "run.jsonl")).train()
    assert not any(factor.any() for name, factor in tuned.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("filtered", [True, False])
def test_losses_that_are_no_numbers_show_though_the_trainer_filters_them(tmp_path, filtered):
    class Broken(WithLoss):
        calls = 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            result = super().forward(x, labels)
            return result if self.calls < 7 else {**result, "loss": result["loss"] * math.nan}

    done = trainer(
        runs.adapted(),
        tmp_path,
        RecordTraining(tmp_path / "run.jsonl"),
        logging_steps=2,
        logging_nan_inf_filter=filtered,
    )
    done.model.__class__ = Broken
    done.train()
    text = str(lora_fx.read_record(tmp_path / "run.jsonl"))
    assert ("loss is NaN from step 8 (mean of steps 7 to 8)" in text) == (not filtered)
    assert "ΔW is not finite from step 8" in text
    assert ("logging_nan_inf_filter" in text) == filtered
