"""Adapters in files: PEFT's format both ways, and every way in which a file can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.checkpoint.names import CONFIG_FILE, WEIGHTS_FILE, pattern_value, target_modules
from lora_fx.checkpoint.write import write_files
from lora_fx.errors import AdapterFileError, AdapterMismatchError, LoraFxWarning, RefusedError
from tests import zoo
from tests.zoo import rules

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


def logits(each: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return each(X)


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
    with pytest.raises(OSError, match="directory"):
        write_files(tmp_path, {"b": b"a file cannot replace a directory"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


# -- what is wrong with a file


def rewrite(folder, change) -> None:
    """Let `change` alter the tensors; the file is then written as PEFT would, without lora_fx's header."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def reconfigure(folder, **values) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text()) | values
    (folder / CONFIG_FILE).write_text(json.dumps(config))


FIRST = "base_model.model.layer.0.attention.query.lora_A.weight"
FIRST_B = "base_model.model.layer.0.attention.query.lora_B.weight"


def truncated(folder) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-100])


def four_bytes(folder) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"\x00\x01\x02\x03")


def flipped(folder) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-5] ^= 0x10
    (folder / WEIGHTS_FILE).write_bytes(content)


def huge_header(folder) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 2**40) + content[8:])


def no_weights(folder) -> None:
    (folder / WEIGHTS_FILE).unlink()


def a_pickle(folder) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")


def no_config(folder) -> None:
    (folder / CONFIG_FILE).unlink()


def cut_config(folder) -> None:
    (folder / CONFIG_FILE).write_text('{"peft_type": "LO')


def other_kind(folder) -> None:
    reconfigure(folder, peft_type="LOHA")


def other_rank(folder) -> None:
    rewrite(folder, lambda tensors: None)
    reconfigure(folder, r=16)


def other_alpha(folder) -> None:
    reconfigure(folder, lora_alpha=99)


def lost_factor(folder) -> None:
    rewrite(folder, lambda tensors: tensors.pop(FIRST_B))


def lost_target(folder) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".value." in key])


def extra_tensor(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.layer.0.unknown": torch.zeros(2)}))


def not_a_number(folder) -> None:
    rewrite(folder, lambda tensors: tensors[FIRST][0].fill_(float("nan")))


def infinite(folder) -> None:
    rewrite(folder, lambda tensors: tensors[FIRST][0].fill_(float("inf")))


def do_not_multiply(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({FIRST_B: torch.zeros(16, 5)}))


def pissa(folder) -> None:
    reconfigure(folder, init_lora_weights="pissa")


def token_rows(folder) -> None:
    reconfigure(folder, trainable_token_indices=[1, 2])


WRONG_FILES = {
    truncated: "cannot be read",
    four_bytes: "cannot be read",
    flipped: "is damaged: its contents have changed since they were written",
    huge_header: "cannot be read",
    no_weights: "does not exist",
    a_pickle: "a pickle, which is not read",
    no_config: "does not exist",
    cut_config: "is not JSON",
    other_kind: "is not the configuration of a LoRA adapter",
    other_rank: "has rank 4, adapter_config.json says 16",
    other_alpha: "contradicts adapter_config.json at layer.0.attention.query",
    lost_factor: f"{FIRST_B}  is missing",
    lost_target: "target_modules layer.0.attention.value  has no tensors in the file",
    extra_tensor: "base_model.model.layer.0.unknown  is of no kind that lora_fx knows",
    not_a_number: "has NaN or infinite values",
    infinite: "has NaN or infinite values",
    do_not_multiply: "lora_A [4, 16] and lora_B [16, 5] do not multiply",
    pissa: "'pissa' changes the base weights",
    token_rows: "trainable tokens",
}


@pytest.mark.parametrize("spoil", WRONG_FILES, ids=lambda each: each.__name__)
def test_wrong_file_is_a_clear_error_and_model_and_files_stay(spoil, saved):
    spoil(saved)
    base = model()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()}
    with pytest.raises(AdapterFileError) as caught:
        lora_fx.load(base, saved)
    assert WRONG_FILES[spoil] in str(caught.value)
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()} == files


def test_directory_without_an_adapter_names_those_that_have_one(saved, tmp_path):
    outer = tmp_path / "runs"
    shutil.copytree(saved, outer / "last", ignore=lambda *_: ["runs"])
    with pytest.raises(AdapterFileError, match="these folders in it hold one: last"):
        lora_fx.load(model(), outer)


# -- what does not fit a model


def test_every_site_that_the_model_has_not_is_named(saved):
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(zoo.Encoder(layers=2), saved)
    assert caught.value.mismatches[:2] == (
        ("layer.2.attention.query", "16 → 16", "has no such linear"),
        ("layer.2.attention.value", "16 → 16", "has no such linear"),
    )


def test_other_shapes_are_named_with_both_sides(saved):
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(zoo.Encoder(width=32), saved)
    assert ("layer.0.attention.query", "16 → 16", "32 → 32") in caught.value.mismatches


def test_other_base_of_the_same_shape_is_refused(saved):
    torch.manual_seed(9)
    with pytest.raises(AdapterMismatchError, match="is another base, or was changed since"):
        lora_fx.load(zoo.Encoder(), saved)


def test_file_without_a_fingerprint_loads_onto_any_base_of_its_shape(saved):
    rewrite(saved, lambda tensors: None)
    torch.manual_seed(9)
    lora_fx.load(zoo.Encoder(), saved)


def test_adapted_model_takes_no_second_adapter(saved):
    with pytest.raises(RefusedError, match="adapted already"):
        lora_fx.load(adapted(), saved)


# -- names


def test_list_of_targets_never_claims_another_module():
    modules = ["lin", "block.lin", "block.other"]
    assert target_modules(["block.other"], modules) == ["block.other"]
    assert target_modules(["lin"], modules) == "^(lin)$"


def test_patterns_are_read_as_peft_reads_them():
    patterns = {"^a.b": 2, "b": 3}
    assert [pattern_value(patterns, path, 8) for path in ("a.b", "c.b", "c.d")] == [2, 3, 8]


# -- PEFT, both ways

peft = pytest.importorskip("peft")

PEFT_CASES = {
    "plain": ({"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]}, None),
    "rslora": ({"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["output"]}, None),
    "dora": ({"r": 3, "use_dora": True, "target_modules": ["query", "intermediate"]}, None),
    "patterns": (
        {"r": 4, "target_modules": ["query", "dense"], "rank_pattern": {"layer.1.attention.query": 2},
         "alpha_pattern": {"dense": 32}}, None,
    ),
    "expression": ({"r": 2, "target_modules": r".*\.(key|output)"}, None),
    "heads": ({"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}, None),
    "bias": ({"r": 2, "target_modules": ["query"], "bias": "lora_only"}, None),
}  # fmt: skip


def jitter(each: nn.Module) -> None:
    with torch.no_grad():
        for parameter in each.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore")
def test_adapter_that_peft_wrote_computes_the_same_here(case, tmp_path):
    theirs = peft.get_peft_model(model(), peft.LoraConfig(**PEFT_CASES[case][0]))
    jitter(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load(model(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(lora_fx.merge(ours)), logits(merged), rtol=1e-5, atol=1e-5)


OUR_CASES = {
    "plain": rules("**.{query,value}"),
    "mixed": MIXED,
    "dora": rules("**.query", dora=True),
    "bias": rules("**.{query,output}", bias=True),
    "rslora": rules("**.output", rslora=True),
}


@pytest.mark.parametrize("case", OUR_CASES)
@pytest.mark.filterwarnings("error:Found missing adapter keys", "ignore:.*:DeprecationWarning")
def test_adapter_that_we_wrote_computes_the_same_in_peft(case, tmp_path):
    ours = adapted(OUR_CASES[case])
    lora_fx.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_root_level_name_that_peft_would_match_elsewhere_is_pinned(tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.inner = nn.Linear(16, 16), zoo.Mlp()

        def forward(self, x):
            return self.inner(self.fc1(x))

    torch.manual_seed(0)
    base = Nested().eval()
    ours = lora_fx.apply(base, rules("fc1", init="random"), backend="modules")
    lora_fx.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(zoo.features(2, 3)), ours(zoo.features(2, 3)), rtol=1e-5, atol=1e-5)
