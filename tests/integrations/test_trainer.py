"""The transformers Trainer trains adapted models: best model, resume, checkpoints that hold the adapter alone."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_fx
from lora_fx.integrations.pretrained import trained_tensors
from lora_fx.integrations.trainer import AdapterCheckpoints
from tests.support import zoo
from tests.support.peers import BERT, LLAMA, T5, VIT, Peer, adapted, assert_same, counts, each

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the Trainer's own: no GPU to pin memory for
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = 6


class Examples(torch.utils.data.Dataset):
    """Twelve examples of what a peer is trained on; inputs and labels never change."""

    def __init__(self, peer: Peer) -> None:
        self.items: list[dict[str, Tensor]] = []
        for seed in range(12):
            given = {key: value[0] for key, value in peer.inputs(1, 5 + seed).items()}
            if peer in (LLAMA, T5):
                given = {key: value[:5] for key, value in given.items()}
                given["labels"] = given.pop("decoder_input_ids", given["input_ids"])
            elif peer is BERT:
                given = {key: value[:5] for key, value in given.items()}
            self.items.append({"labels": torch.tensor(seed % 5), **given})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


class Interrupt(TrainerCallback):
    """Ends the training after a step, as a crash would; the learning rate knows nothing of it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def trainer(peer: Peer, folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=3, learning_rate=0.02, logging_steps=1,
        save_steps=2, eval_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, seed=1, **options,
    )  # fmt: skip
    data = Examples(peer)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[*callbacks])


def losses(done: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in done.state.log_history if "loss" in entry}


def keys(file: Path) -> set[str]:
    with safe_open(file, "pt") as content:
        return set(content.keys())


@each((BERT,), slow=(LLAMA,))
def test_training_gives_the_losses_and_the_adapter_of_the_module_backend(peer: Peer, tmp_path):
    runs = []
    for backend in ("auto", "modules"):
        tuned = adapted(peer, backend, random=False, dropout=0.1)
        done = trainer(peer, tmp_path / backend, tuned, save_strategy="no")
        done.train()
        runs.append((losses(done), list(lora_fx.parameters(tuned))))
    (ours, one), (theirs, other) = runs
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert list(ours) == list(range(1, STEPS + 1))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def resumed_as_uninterrupted(peer: Peer, folder: Path, *make: type[TrainerCallback]) -> None:
    """Assert that training with a break gives the losses and the adapter of training without one.

    Bit by bit: so without optimisations, with which the first call of a new process that fits no graph rounds otherwise.
    """

    def model() -> nn.Module:
        return adapted(peer, random=False, optimise=False)

    whole = trainer(peer, folder / "whole", model(), *(make_model() for make_model in make))
    whole.train()
    first = trainer(peer, folder / "part", model(), Interrupt(4), *(make_model() for make_model in make))
    first.train()
    second = trainer(peer, folder / "part", model(), *(make_model() for make_model in make))
    second.train(resume_from_checkpoint=str(folder / "part" / "checkpoint-4"))
    assert list(losses(first)) == [1, 2, 3, 4]
    assert losses(second) == losses(whole)
    assert_same(list(lora_fx.parameters(second.model)), list(lora_fx.parameters(whole.model)))


@each((LLAMA,), slow=(T5,))
def test_training_resumed_from_an_adapter_checkpoint_goes_on_as_if_uninterrupted(peer: Peer, tmp_path):
    resumed_as_uninterrupted(peer, tmp_path, AdapterCheckpoints)


@each((BERT,), slow=(VIT,))
def test_training_resumed_from_what_the_model_itself_saves_goes_on_as_if_uninterrupted(peer: Peer, tmp_path):
    resumed_as_uninterrupted(peer, tmp_path)


def test_check_of_resumed_training_fails_where_the_adapter_is_not_restored(tmp_path):
    class Forgetful(AdapterCheckpoints):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                kept = [p.clone() for p in lora_fx.parameters(model)]
                for parameter in lora_fx.parameters(model):
                    parameter.zero_()
                super().on_save(args, state, control, model=model, **kwargs)
                for parameter, value in zip(lora_fx.parameters(model), kept, strict=True):
                    parameter.copy_(value)

    with pytest.raises(AssertionError):
        resumed_as_uninterrupted(BERT, tmp_path, Forgetful)


@each((BERT,), slow=(LLAMA,))
def test_best_model_is_loaded_at_the_end_from_checkpoints_that_hold_the_adapter_alone(peer: Peer, tmp_path):
    options = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "worse"}
    best: dict[int, list[Tensor]] = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            best[state.global_step] = [p.detach().clone() for p in lora_fx.parameters(model)]

    tuned = adapted(peer, random=False)
    done = trainer(peer, tmp_path, tuned, Remember(), **options)
    scores = iter([1.0, 3.0, 2.0])
    done.compute_metrics = lambda predictions: {"worse": next(scores)}
    done.train()
    assert Path(done.state.best_model_checkpoint).name == "checkpoint-4"
    assert_same(list(lora_fx.parameters(tuned)), best[4])
    assert not torch.equal(best[4][1], best[6][1])


def test_a_checkpoint_and_what_is_saved_afterwards_hold_the_adapter_and_nothing_of_the_base(tmp_path):
    tuned = adapted(BERT, random=False)
    done = trainer(BERT, tmp_path, tuned)
    done.train()
    done.save_model(str(tmp_path / "saved"))
    folder = tmp_path / "checkpoint-6"
    names = {
        f"{site.path}.{factor}.default.weight"
        for site in lora_fx.inspect(tuned).sites
        for factor in ("lora_A", "lora_B")
    }
    assert keys(folder / "model.safetensors") == names
    assert len(keys(folder / "adapter_model.safetensors")) == len(names)
    assert not (folder / "config.json").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    for place in (folder, tmp_path / "saved"):
        loaded = lora_fx.load(BERT.build(), place, BERT.inputs(2, 6))
        with torch.no_grad():
            assert_same(BERT.call(loaded), BERT.call(tuned.eval()))
    assert not any("pooler.dense.weight" in key for key in keys(tmp_path / "saved" / "model.safetensors"))


def test_modules_that_are_trained_whole_and_running_statistics_are_kept(tmp_path):
    model = zoo.WithNorm()
    tuned = lora_fx.apply(model, zoo.rules("fc", train=["out"]), (zoo.features(4, 3),))
    assert set(trained_tensors(tuned)) == {
        "fc.lora_A.default.weight", "fc.lora_B.default.weight", "out.weight", "out.bias",
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip


class Hub:
    """Keeps what is uploaded in a folder, in place of a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=name)

    def upload_folder(
        self,
        folder_path: str,
        ignore_patterns: Any = None,
        path_in_repo: str = "",
        run_as_future: bool = False,
        **_: Any,
    ) -> Any:
        ignored = shutil.ignore_patterns(*(ignore_patterns or ()))
        shutil.copytree(folder_path, self.folder / path_in_repo, dirs_exist_ok=True, ignore=ignored)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def test_what_a_trainer_pushes_while_it_trains_is_the_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: Hub(tmp_path / "hub"))
    tuned = adapted(BERT, random=False, optimise=False)
    options = {"push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": "checkpoint", "hub_always_push": True}
    done = trainer(BERT, tmp_path / "run", tuned, **options)
    done.train()
    with torch.no_grad():
        expected = BERT.call(tuned.eval())
    for folder in (tmp_path / "hub", tmp_path / "hub" / "last-checkpoint"):
        with torch.no_grad():
            assert_same(BERT.call(lora_fx.load(BERT.build(), folder, BERT.inputs(2, 6))), expected)
        assert not (folder / "config.json").exists(), "nobody takes it for a whole model"
        assert not any("pooler.dense.weight" in key for key in keys(folder / "model.safetensors"))
    done.push_to_hub()
    with torch.no_grad():
        assert_same(BERT.call(lora_fx.load(BERT.build(), tmp_path / "hub", BERT.inputs(2, 6))), expected)


def test_columns_of_a_model_whose_root_is_a_region_are_not_dropped(tmp_path):
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = zoo.Mlp()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            result = self.mlp(x)
            return {"loss": (result - labels).square().mean(), "found": result}

    data = [{"x": zoo.features(1, 1)[0, 0], "labels": torch.zeros(16)} for _ in range(6)]
    tuned = lora_fx.apply(Regression(), zoo.rules("**"), (zoo.features(2, 3)[:, 0], torch.zeros(2, 16)))
    assert [region.path for region in lora_fx.inspect(tuned).regions] == [""]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        per_device_train_batch_size=3, save_strategy="no",
    )  # fmt: skip
    done = Trainer(tuned, arguments, train_dataset=data)
    done.train()
    assert list(losses(done)) == [1, 2]
    assert counts(tuned)[0] > 0
