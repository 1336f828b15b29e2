"""Lightning's callbacks: records as of a plain loop, and checkpoints that hold the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.integrations.lightning import (
    LightningAdapterCheckpoints,
    LightningRecorder,
    load_adapter_checkpoint,
)
from tests.support import runs
from tests.support.lightnings import Holding, Itself, by_hand, fitted, keys
from tests.support.runs import assert_alike, plain

pytestmark = [pytest.mark.filterwarnings("ignore")]  # those of Lightning itself


@pytest.mark.parametrize("kind", [Holding, Itself])
def test_lightning_writes_what_a_plain_loop_writes(tmp_path, kind):
    fitted(kind.make(), tmp_path, LightningRecorder(tmp_path / "lightning.jsonl", every=5))
    record = lora_fx.read_record(tmp_path / "lightning.jsonl")
    expected = plain(tmp_path / "plain.jsonl")
    assert_alike(record, expected)
    assert (record.model == expected.model) == (kind is Holding)


def test_batches_whose_gradients_are_summed_are_one_step_with_their_mean_loss(tmp_path):
    tuned = runs.adapted()
    fitted(Holding(tuned), tmp_path, LightningRecorder(tmp_path / "run.jsonl", every=1), accumulate_grad_batches=3)
    record, other = lora_fx.read_record(tmp_path / "run.jsonl"), runs.adapted()
    assert [line.step for line in record.steps] == [1, 2, 3, 4]
    first = sum(runs.loss_of(other, batch).item() for batch in runs.batches()[:3]) / 3
    assert record.steps[0].loss == pytest.approx(first, rel=1e-5)


def test_the_last_step_of_an_epoch_with_fewer_batches_has_the_mean_loss_of_those(tmp_path):
    class Numbered(Holding):
        def training_step(self, batch: Any, number: int) -> Tensor:
            return super().training_step(batch, number) * 0 + number

    path = tmp_path / "run.jsonl"
    fitted(Numbered(runs.adapted()), tmp_path, LightningRecorder(path, every=1), accumulate_grad_batches=5)
    assert lora_fx.read_record(path).losses() == [(1, 2.0), (2, 7.0), (3, 10.5)]


def test_optimisation_by_hand_is_recorded_too(tmp_path):
    fitted(by_hand(runs.adapted()), tmp_path, LightningRecorder(tmp_path / "run.jsonl", every=5))
    assert_alike(lora_fx.read_record(tmp_path / "run.jsonl"), plain(tmp_path / "plain.jsonl"))


def test_record_ends_where_a_training_failed(tmp_path):
    class Failing(Holding):
        def training_step(self, batch: Any, number: int) -> Tensor:
            if number == 7:
                raise KeyError("mine")
            return super().training_step(batch, number)

    with pytest.raises(KeyError, match="mine"):
        fitted(Failing.make(), tmp_path, LightningRecorder(tmp_path / "run.jsonl", every=5))
    assert [line.step for line in lora_fx.read_record(tmp_path / "run.jsonl").steps] == [5, 7]


# -- Lightning's checkpoints


def checkpointed(module: nn.Module, folder: Path, *callbacks: Any, resumed: Path | None = None, **options: Any) -> Any:
    """Train for three epochs; a checkpoint is written at the end of each, as within one Lightning begins the data anew."""
    saving = ModelCheckpoint(folder, "{step}", every_n_epochs=1, save_top_k=-1)
    return fitted(module, folder, saving, *callbacks, ckpt_path=resumed, batches=4, **{"max_epochs": 3, **options})


@pytest.mark.parametrize("kind", [Holding, Itself])
def test_checkpoint_holds_what_is_trained_and_nothing_of_the_base(tmp_path, kind):
    module = kind.make()
    checkpointed(module, tmp_path, LightningAdapterCheckpoints())
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    names = {name for name, p in module.named_parameters() if "lora_" in name}
    assert set(checkpoint["state_dict"]) == names
    assert len(names) == 12
    assert len(checkpoint["optimizer_states"][0]["param_groups"][0]["params"]) == 12


@pytest.mark.parametrize("kind", [Holding, Itself])
def test_training_that_resumes_goes_on_as_if_uninterrupted(tmp_path, kind):
    whole, first, second = (kind.make(adam=True) for _ in range(3))
    checkpointed(whole, tmp_path / "whole", LightningAdapterCheckpoints())
    checkpointed(first, tmp_path / "part", LightningAdapterCheckpoints(), max_epochs=1)
    checkpointed(second, tmp_path / "part", LightningAdapterCheckpoints(), resumed=tmp_path / "part" / "step=4.ckpt")
    expected = list(lora_fx.parameters(whole))
    assert all(map(torch.equal, lora_fx.parameters(second), expected))
    assert not all(map(torch.equal, lora_fx.parameters(first), expected))


def test_resumed_training_without_the_state_of_its_optimizer_would_be_found(tmp_path):
    whole, second = (Holding.make(adam=True) for _ in range(2))
    checkpointed(whole, tmp_path / "whole", LightningAdapterCheckpoints())
    path = tmp_path / "whole" / "step=8.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"].zero_()
    torch.save(checkpoint, path)
    checkpointed(second, tmp_path / "part", LightningAdapterCheckpoints(), resumed=path)
    assert not all(map(torch.equal, lora_fx.parameters(second), lora_fx.parameters(whole)))


def test_another_base_is_refused_before_anything_is_trained(tmp_path):
    checkpointed(Holding.make(), tmp_path, LightningAdapterCheckpoints(), max_epochs=1)
    other = runs.base()
    other[1].up.weight.data.mul_(1.5)
    module = Holding(runs.adapted(other))
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"model\.1\.up\.weight"):
        checkpointed(module, tmp_path, LightningAdapterCheckpoints(), resumed=tmp_path / "step=4.ckpt")
    with pytest.raises(lora_fx.AdapterMismatchError, match="of another base"):
        load_adapter_checkpoint(Holding(runs.adapted(other)), tmp_path / "step=4.ckpt")


def test_adapters_that_do_not_fit_are_refused_all_or_nothing(tmp_path):
    checkpointed(Holding.make(), tmp_path, LightningAdapterCheckpoints(), max_epochs=1)
    module = Holding(runs.adapted(rules=runs.zoo.rules("*.{up,down}", r=3)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpointed(module, tmp_path, LightningAdapterCheckpoints(), resumed=tmp_path / "step=4.ckpt")
    module = Holding(runs.adapted(rules=runs.zoo.rules("*.{up,down}", r=3)))
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(
        lora_fx.AdapterMismatchError, match=r"model.0.up.lora_A.default.weight *file \[2, 6\] *model \[3, 6\]"
    ):
        load_adapter_checkpoint(module, tmp_path / "step=4.ckpt")
    assert all(map(torch.equal, module.parameters(), before))


def test_a_checkpoint_without_base_is_not_read_by_a_trainer_that_does_not_know_of_it(tmp_path):
    checkpointed(Holding.make(), tmp_path, LightningAdapterCheckpoints(), max_epochs=1)
    with pytest.raises(RuntimeError, match="Missing key"):
        checkpointed(Holding.make(), tmp_path, resumed=tmp_path / "step=4.ckpt")


def test_a_checkpoint_with_its_base_is_still_read(tmp_path):
    whole, second = (Holding.make(adam=True) for _ in range(2))
    checkpointed(whole, tmp_path)
    checkpointed(second, tmp_path / "part", LightningAdapterCheckpoints(), resumed=tmp_path / "step=8.ckpt")
    assert all(map(torch.equal, lora_fx.parameters(second), lora_fx.parameters(whole)))


def test_checkpoint_is_read_outside_of_a_trainer_and_saved_as_an_adapter(tmp_path):
    module, again = Holding.make(), Holding.make()
    checkpointed(module, tmp_path, LightningAdapterCheckpoints())
    load_adapter_checkpoint(again, tmp_path / "step=12.ckpt")
    assert all(map(torch.equal, lora_fx.parameters(again), lora_fx.parameters(module)))
    lora_fx.save(again.model, tmp_path / "adapter")
    loaded = lora_fx.load(runs.base(), tmp_path / "adapter")
    assert all(map(torch.equal, lora_fx.parameters(loaded), lora_fx.parameters(module)))


def test_the_reference_model_of_a_twin_is_left_out_and_what_is_foreign_is_kept(tmp_path):
    model = runs.base()
    module = Holding(runs.adapted(model))
    module.reference = model.requires_grad_(False)  # shares its memory with the twin
    module.teacher = nn.Linear(6, 6).requires_grad_(False)
    module.register_buffer("seen", torch.ones(1))
    checkpointed(module, tmp_path, LightningAdapterCheckpoints(), max_epochs=1)
    kept = keys(tmp_path / "step=4.ckpt")
    assert {name for name in kept if "lora_" not in name} == {"teacher.weight", "teacher.bias", "seen"}


def test_ways_of_saving_that_would_write_the_base_are_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(RefusedError, match="save_weights_only"):
        fitted(Holding.make(), tmp_path, saving, LightningAdapterCheckpoints())
    with pytest.raises(RefusedError, match="not adapted"):
        fitted(Holding(runs.base()), tmp_path, LightningAdapterCheckpoints())
    strategy = type("FSDPStrategy", (), {"restore_checkpoint_after_setup": True})()
    with pytest.raises(RefusedError, match="FSDPStrategy"):
        LightningAdapterCheckpoints().setup(type("T", (), {"strategy": strategy})(), Holding.make(), "fit")


def test_module_reads_state_dicts_as_before_after_the_training(tmp_path):
    module = Holding.make()
    checkpointed(module, tmp_path, LightningAdapterCheckpoints(), max_epochs=1)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"])


# -- what Lightning itself does


class Counting(Callback):
    """Notes (epoch, number of the batch, first value of it) of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch_idx, batch[0][0, 0].item()))


def seen(module: nn.Module, folder: Path, resumed: Path | None = None, **options: Any) -> list[tuple[int, int, float]]:
    """Train, and return what `Counting` has noted."""
    counting = Counting()
    checkpointed(module, folder, counting, resumed=resumed, **options)
    return counting.seen


def test_lightning_saves_the_base_where_weights_only_are_asked_for(tmp_path):
    trainer = fitted(Holding.make(), tmp_path, LightningAdapterCheckpoints(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "all.ckpt", weights_only=True)
    assert "model.0.up.weight" in keys(tmp_path / "all.ckpt")


def test_lightning_begins_the_data_anew_when_it_resumes_within_an_epoch(tmp_path):
    whole = seen(Holding.make(), tmp_path, max_epochs=1)
    halfway = ModelCheckpoint(tmp_path, "half", every_n_train_steps=2, save_top_k=1)
    fitted(Holding.make(), tmp_path, halfway, batches=4, max_steps=2)
    resumed = seen(Holding.make(), tmp_path, tmp_path / "half.ckpt", max_epochs=1)
    assert [number for _, number, _ in resumed] == [2, 3]
    assert [value for *_, value in resumed] == [value for *_, value in whole[:2]]


def test_lightning_with_max_steps_resumes_an_ended_epoch_with_one_batch_too_much(tmp_path):
    seen(Holding.make(), tmp_path)
    path = tmp_path / "step=4.ckpt"
    assert [step[:2] for step in seen(Holding.make(), tmp_path / "a", path)][:2] == [(1, 0), (1, 1)]
    assert [step[:2] for step in seen(Holding.make(), tmp_path / "b", path, max_steps=12)][:2] == [(0, 4), (1, 0)]
