"""Adapters in files: PEFT's format both ways, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.errors import AdapterFileError, LoraFxWarning, RefusedError
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
from lora_fx.files.atomic import write_files
from lora_fx.tuned.build import record_in
from tests.support import zoo
from tests.support.zoo import rules

MIXED = {
    "version": 1,
    "rules": [
        {"match": {"name": "layer.0.**.query"}, "lora": {"r": 2, "alpha": 8}},
        {"match": {"name": "**.{query,value}"}, "lora": {"r": 4, "alpha": 16}},
        {"match": {"name": "**.output"}, "lora": {"r": 4, "alpha": 16, "rslora": True}},
    ],
    "train": ["classifier"],
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.Encoder().eval()


def adapted(chosen: object = None, seed: int = 1) -> nn.Module:
    tuned = lora_fx.apply(model(), chosen or rules("**.{query,value}"), backend="modules").eval()
    zoo.randomise_(tuned, seed)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            if parameter.dim() == 1 or parameter.shape[0] == 5:  # the classifier under `train:`
                parameter.add_(0.25)
    return tuned


@pytest.fixture
def saved(tmp_path):
    lora_fx.save(adapted(), tmp_path)
    return tmp_path


X = zoo.tokens(3, 7)


def logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(X)


# -- what is written


def test_keys_are_those_of_peft(saved):
    assert sorted(load_file(saved / WEIGHTS_FILE)) == sorted(
        f"base_model.model.layer.{i}.attention.{site}.lora_{factor}.weight"
        for i in range(3)
        for site in ("query", "value")
        for factor in "AB"
    )
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 4, 16, False)
    assert config["target_modules"] == [f"layer.{i}.attention.{site}" for i in range(3) for site in ("query", "value")]
    assert config["rank_pattern"] == {}


def test_other_ranks_and_alphas_go_into_anchored_patterns(tmp_path):
    lora_fx.save(adapted(MIXED), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["rank_pattern"] == {"^layer\\.0\\.attention\\.query": 2}
    assert config["alpha_pattern"] == {
        "^layer\\.0\\.attention\\.query": 8,
        **{f"^layer\\.{i}\\.output": 32.0 for i in range(3)},
    }
    assert config["modules_to_save"] == ["classifier"]


def test_equal_adapters_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        lora_fx.save(adapted(MIXED), tmp_path / name)
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    lora_fx.save(adapted(MIXED, seed=2), tmp_path / "c")
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() != (tmp_path / "c" / WEIGHTS_FILE).read_bytes()


def test_saving_what_was_loaded_writes_the_same_bytes(saved, tmp_path):
    lora_fx.save(lora_fx.load(model(), saved), tmp_path / "again")
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


def test_other_files_of_the_directory_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    lora_fx.save(adapted(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


def test_several_adapters_are_saved_and_loaded_together(tmp_path):
    chosen = {
        "version": 1,
        "rules": [
            {"match": {"name": "**.query"}, "lora": {"r": 2}},
            {"match": {"name": "**.value"}, "lora": {"r": 3, "adapter": "style"}},
        ],
    }
    tuned = adapted(chosen)
    lora_fx.save(tuned, tmp_path)
    assert (tmp_path / "style" / WEIGHTS_FILE).is_file()
    loaded = lora_fx.load(model(), tmp_path)
    assert torch.equal(logits(loaded), logits(tuned))
    assert loaded.layer[0].attention.value.lora_A["style"].weight.shape == (3, 16)


@pytest.mark.parametrize("chosen", [None, MIXED, rules("**.query", dora=True), rules("**.{query,output}", bias=True)])
def test_loaded_adapter_computes_the_same_bit_by_bit(chosen, tmp_path):
    tuned = adapted(chosen)
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(model(), tmp_path)
    assert torch.equal(logits(loaded), logits(tuned))
    assert torch.equal(logits(lora_fx.merge(loaded)), logits(lora_fx.merge(tuned)))
    assert lora_fx.inspect(loaded).trainable == lora_fx.inspect(tuned).trainable


def test_plan_of_a_loaded_adapter_says_what_is_trained_whole(tmp_path):
    lora_fx.save(adapted(MIXED), tmp_path / "adapter")
    plan = record_in(lora_fx.load(model(), tmp_path / "adapter")).plan
    (whole,) = (site for site in plan.sites if site.decision == "train")
    assert (whole.path, whole.reason) == ("classifier", "under train: adapter: modules_to_save")


def test_base_loaded_in_another_dtype_is_the_same_base(saved):
    loaded = lora_fx.load(model().to(torch.bfloat16), saved)
    assert loaded(X).dtype == torch.bfloat16


def test_statistics_that_training_moved_are_told_when_they_are_not_saved(tmp_path):
    tuned = lora_fx.apply(zoo.WithNorm(), rules("fc"), backend="modules").train()
    lora_fx.save(tuned, tmp_path / "still")
    tuned(zoo.features(4, 3))
    with pytest.warns(LoraFxWarning, match=r"norm\.running_mean"):
        lora_fx.save(tuned, tmp_path / "moved")


def test_trained_module_takes_its_statistics_along(tmp_path):
    torch.manual_seed(0)
    base = zoo.WithNorm()
    tuned = lora_fx.apply(base, rules("fc", train=["norm"]), backend="modules").train()
    tuned(zoo.features(4, 3))
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(base, tmp_path).eval()
    assert torch.equal(loaded(zoo.features(2, 3)), tuned.eval()(zoo.features(2, 3)))


# -- writing is atomic


def test_failed_write_leaves_the_old_files_and_no_others(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    synced = []

    def full(handle):
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterFileError, match="No space left on device"):
        lora_fx.save(adapted(seed=5), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_failed_write_of_a_second_adapter_leaves_the_first_as_it_was(tmp_path, monkeypatch):
    chosen = rules("**.query") | {"rules": [*rules("**.query")["rules"], *rules("**.key", adapter="style")["rules"]]}
    lora_fx.save(adapted(chosen), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    synced = []

    def full(handle):
        synced.append(handle)
        if len(synced) == 3:  # both files of one adapter are on disk
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterFileError):
        lora_fx.save(adapted(chosen, seed=5), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_killed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    code = (
        "import os, pathlib\nfrom lora_fx.files.atomic import write_files\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), 9)\nwrite_files({pathlib.Path('a'): b'new' * 1000})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -9
    assert (tmp_path / "a").read_bytes() == b"old"


class LoraOfOthers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", [LoraOfOthers, lambda: nn.Linear(4, 4)], ids=["a LoRA of others", "plain"])
def test_model_without_adapters_of_ours_is_told_so(make, device, tmp_path):
    with pytest.raises(RefusedError, match="the model is not adapted"):
        lora_fx.save(nn.Sequential(make()).to(device), tmp_path)


def test_module_trained_whole_without_values_is_named(tmp_path):
    tuned = adapted(MIXED)
    tuned.classifier.to("meta")
    with pytest.raises(AdapterFileError, match="meta device") as caught:
        lora_fx.save(tuned, tmp_path)
    assert caught.value.facts == (("classifier.weight", "has no values"), ("classifier.bias", "has no values"))


def test_directory_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(AdapterFileError, match="cannot be written"):
        lora_fx.save(adapted(), tmp_path / "adapter")


def test_adapter_without_values_is_not_saved(tmp_path):
    with torch.device("meta"):
        empty = zoo.Encoder()
    with pytest.raises(AdapterFileError, match="meta device"):
        lora_fx.save(lora_fx.apply(empty, rules("**.query"), backend="modules"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_write_files_puts_all_in_place_or_none(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError):
        write_files({tmp_path / "a": b"", tmp_path / "b": b"a file cannot replace a directory"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
