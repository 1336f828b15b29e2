"""Adapters merged into checkpoints on disk: the same bits as in memory, in little memory, whatever interrupts it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import merge_checkpoint
from lora_fx.adapters.dora import merged_dora_weight
from lora_fx.adapters.lora import folded_weight, low_rank_weight
from lora_fx.errors import AdapterFileError, AdapterMismatchError, MergeError
from lora_fx.files.checkpoint import outfolder, rawbytes, streaming, tiles
from lora_fx.files.checkpoint.rounding import Noise, round_into
from lora_fx.files.rawfile import read_raw
from lora_fx.rules.keys import OPS
from tests.support import zoo
from tests.support.merging import PREFIX, contents, delta, factors, loaded, weight, write_adapter, write_base

ROOT = Path(__file__).parents[2]
Q, UP, NORM = "model.layers.0.q_proj", "model.layers.0.up_proj", "model.layers.0.norm"


def base_tensors(dtype=torch.bfloat16):
    return {
        f"{Q}.weight": weight(48, 48, dtype=dtype),
        f"{UP}.weight": weight(96, 48, dtype=dtype),
        f"{NORM}.weight": weight(48, dtype=dtype),
        "model.embed_tokens.weight": weight(50, 48, dtype=dtype),
        "steps": torch.arange(7),
    }


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", base_tensors())


@pytest.fixture
def sharded(tmp_path):
    tensors = base_tensors()
    head = {name: tensors.pop(name) for name in (f"{Q}.weight", f"{NORM}.weight")}
    return write_base(tmp_path / "sharded", head, tensors)


@pytest.fixture
def both():
    return {**factors(Q, 48, 48), **factors(UP, 96, 48)}


@pytest.fixture
def adapter(tmp_path, both):
    return write_adapter(tmp_path / "adapter", both)


def in_memory(tensors, adapter, *paths, scaling=1.5):
    """Return the tensors with those sites merged by the functions that `merge` uses."""
    merged = dict(tensors)
    for path in paths:
        factor = [adapter[f"{PREFIX}{path}.lora_{name}.weight"] for name in "AB"]
        merged[f"{path}.weight"] = folded_weight(tensors[f"{path}.weight"], low_rank_weight(*factor, scaling))
    return merged


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# -- what is written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merged_checkpoint_has_the_bits_of_a_merge_in_memory(tmp_path, adapter, both, dtype):
    base = write_base(tmp_path / "base", base_tensors(dtype))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), in_memory(loaded(base), both, Q, UP))


def test_shards_keep_their_names_and_index_and_config_and_tokenizer_are_copied(tmp_path, sharded, adapter, both):
    merge_checkpoint(sharded, adapter, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == sorted(contents(sharded))
    assert_same(loaded(tmp_path / "out"), in_memory(loaded(sharded), both, Q, UP))
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.json"):
        assert contents(tmp_path / "out")[name] == contents(sharded)[name]


def test_only_the_bytes_of_adapted_tensors_differ(tmp_path, base, both):
    adapter = write_adapter(tmp_path / "adapter", factors(UP, 96, 48))
    merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = (contents(each)["model.safetensors"] for each in (base, tmp_path / "out"))
    file = read_raw(base / "model.safetensors")
    start, end = (file.data_start + each for each in file.tensors[f"{UP}.weight"][2:])
    assert (after[:start], after[end:]) == (before[:start], before[end:])
    assert after[start:end] != before[start:end]


def test_shard_without_adapted_tensors_is_the_same_file(tmp_path, sharded):
    merge_checkpoint(sharded, write_adapter(tmp_path / "adapter", factors(Q, 48, 48)), tmp_path / "out")
    name = "model-00002-of-00002.safetensors"
    assert contents(tmp_path / "out")[name] == contents(sharded)[name]


def test_base_and_adapter_stay_unchanged(tmp_path, base, adapter):
    before = contents(base), contents(adapter)
    merge_checkpoint(base, adapter, tmp_path / "out", rounding="stochastic", out_dtype="float16")
    assert (contents(base), contents(adapter)) == before


def test_transformers_loads_what_was_merged_as_the_model_that_lora_fx_merges(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned = lora_fx.apply(model, zoo.rules("**.{q,v,down}_proj"), backend="modules")
    zoo.randomise_(tuned, 1)
    lora_fx.save(tuned, tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert [each.how for each in report.tensors] == 6 * ["merged"]
    found, expected = LlamaForCausalLM.from_pretrained(tmp_path / "out"), lora_fx.merge(tuned)
    assert_same(found.state_dict(), expected.state_dict())


def test_ranks_alphas_and_scalings_are_those_of_each_site(tmp_path, base):
    adapter = {**factors(Q, 48, 48, r=2), **factors(UP, 96, 48, r=4)}
    folder = write_adapter(
        tmp_path / "adapter", adapter, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 16}, use_rslora=True
    )
    merge_checkpoint(base, folder, tmp_path / "out")
    before, after = loaded(base), loaded(tmp_path / "out")
    assert torch.equal(after[f"{Q}.weight"], in_memory(before, adapter, Q, scaling=6 / 2**0.5)[f"{Q}.weight"])
    assert torch.equal(after[f"{UP}.weight"], in_memory(before, adapter, UP, scaling=8.0)[f"{UP}.weight"])


def test_several_adapters_are_added_before_the_one_rounding(tmp_path, base, both, adapter):
    second = factors(Q, 48, 48)
    folder = write_adapter(tmp_path / "second", second)
    report = merge_checkpoint(base, [adapter, folder], tmp_path / "out")
    before, after = loaded(base), loaded(tmp_path / "out")
    exact = before[f"{Q}.weight"].float() + (delta(both, Q) + delta(second, Q))
    assert torch.equal(after[f"{Q}.weight"], exact.to(torch.bfloat16))
    assert torch.equal(after[f"{UP}.weight"], in_memory(before, both, UP)[f"{UP}.weight"])
    assert {each.name: len(each.adapters) for each in report.tensors} == {f"{Q}.weight": 2, f"{UP}.weight": 1}


def test_dora_scales_each_output_to_its_length(tmp_path, base, both):
    lengths = {path: torch.rand(both[f"{PREFIX}{path}.lora_B.weight"].shape[0]) + 0.5 for path in (Q, UP)}
    tensors = both | {f"{PREFIX}{path}.lora_magnitude_vector": each for path, each in lengths.items()}
    merge_checkpoint(base, write_adapter(tmp_path / "adapter", tensors, use_dora=True), tmp_path / "out")
    before, after = loaded(base), loaded(tmp_path / "out")
    for path, each in lengths.items():
        A, B = (both[f"{PREFIX}{path}.lora_{name}.weight"] for name in "AB")
        assert torch.equal(after[f"{path}.weight"], merged_dora_weight(before[f"{path}.weight"], A, B, 1.5, each))


def test_dora_on_weights_whose_outputs_lie_in_several_tiles(tmp_path, monkeypatch):
    """Conv1D stores [in, out], and rows may be longer than a tile: the lengths are found in a pass of their own."""
    monkeypatch.setattr(tiles, "_WIDEST", 64)
    before = {"a.weight": weight(48, 200, dtype=torch.float32), "b.weight": weight(40, 200, dtype=torch.float32)}
    adapter = {**factors("a", 200, 48), **factors("b", 40, 200)}
    lengths = {"a": torch.rand(200) + 0.5, "b": torch.rand(40) + 0.5}
    tensors = adapter | {f"{PREFIX}{path}.lora_magnitude_vector": each for path, each in lengths.items()}
    folder = write_adapter(tmp_path / "adapter", tensors, use_dora=True, fan_in_fan_out=True)
    merge_checkpoint(write_base(tmp_path / "base", before), folder, tmp_path / "out")
    after = loaded(tmp_path / "out")
    for path, each in lengths.items():
        A, B = (adapter[f"{PREFIX}{path}.lora_{name}.weight"] for name in "AB")
        stored = before[f"{path}.weight"].t() if path == "a" else before[f"{path}.weight"]
        expected = merged_dora_weight(stored, A, B, 1.5, each)
        found = after[f"{path}.weight"].t() if path == "a" else after[f"{path}.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_trained_bias_and_whole_modules_replace_the_bases_and_are_rounded_to_its_dtype(tmp_path):
    before = base_tensors() | {f"{Q}.bias": weight(48)}
    norm, bias = torch.randn(48), torch.randn(48)
    tensors = factors(Q, 48, 48) | {f"{PREFIX}{Q}.base_layer.bias": bias, f"{PREFIX}{NORM}.weight": norm}
    folder = write_adapter(tmp_path / "adapter", tensors, bias="lora_only", modules_to_save=["norm"])
    report = merge_checkpoint(write_base(tmp_path / "base", before), folder, tmp_path / "out")
    after = loaded(tmp_path / "out")
    assert torch.equal(after[f"{Q}.bias"], bias.to(torch.bfloat16))
    assert torch.equal(after[f"{NORM}.weight"], norm.to(torch.bfloat16))
    assert sorted(each.how for each in report.tensors) == ["merged", "replaced", "replaced"]


@pytest.mark.parametrize("shards", [1, 2])
def test_new_head_that_the_base_has_not_is_added_in_its_own_dtype(tmp_path, shards):
    tensors = base_tensors()
    parts = [tensors] if shards == 1 else [{"steps": tensors.pop("steps")}, tensors]
    head = torch.randn(3, 48)
    adapter = factors(Q, 48, 48) | {f"{PREFIX}score.weight": head}
    folder = write_adapter(tmp_path / "adapter", adapter, modules_to_save=["score"])
    report = merge_checkpoint(write_base(tmp_path / "base", *parts), folder, tmp_path / "out")
    expected = {name: each for part in parts for name, each in part.items()} | {"score.weight": head}
    assert_same(loaded(tmp_path / "out"), in_memory(expected, adapter, Q))
    assert [each.name for each in report.tensors if each.how == "added"] == ["score.weight"]
    if shards == 2:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"
        assert index["metadata"]["total_size"] == sum(each.nbytes for each in expected.values())


EVERY_KIND = {"version": 1, "rules": [{"match": {"name": "**", "op": list(OPS)}, "lora": {"r": 4}}]}


class Kinds(nn.Module):
    """A weight of each kind that one tensor of a file holds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.conv = nn.Conv2d(3, 24, 3)
        self.square = Conv1D(24, 24)
        self.raw = nn.Parameter(torch.randn(24, 24))
        self.out = nn.Linear(24, 5)

    def forward(self, ids, image):
        return self.out(self.square(self.embed(ids)) @ self.raw) + self.conv(image).mean()


def test_sites_of_every_kind_are_merged_as_in_memory(tmp_path):
    model = Kinds()
    inputs = torch.zeros(1, 3, dtype=torch.long), torch.randn(1, 3, 8, 8)
    tuned = lora_fx.apply(model, EVERY_KIND, inputs, backend="modules")
    zoo.randomise_(tuned, 1)
    lora_fx.save(tuned, tmp_path / "adapter")
    base = write_base(tmp_path / "base", {name: each.clone() for name, each in model.state_dict().items()})
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert sorted(each.name for each in report.tensors) == [
        "conv.weight", "embed.weight", "out.weight", "raw", "square.weight",
    ]  # fmt: skip
    assert_same(loaded(tmp_path / "out"), lora_fx.merge(tuned).state_dict())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.fc(x))


@pytest.mark.parametrize(
    ("model", "inputs", "rule", "told"),
    [
        (nn.Sequential(nn.Conv1d(8, 8, 3, groups=2)), torch.zeros(1, 8, 9), {}, ("0.weight", "a grouped convolution")),
        (Twice(), torch.zeros(1, 8), {"per_call": True}, ("fc.weight", "an adapter of its own for each call")),
    ],
)
def test_what_no_weight_of_the_file_can_hold_is_refused(tmp_path, model, inputs, rule, told):
    rules = {"version": 1, "rules": [EVERY_KIND["rules"][0] | rule]}
    lora_fx.save(lora_fx.apply(model, rules, (inputs,), backend="modules"), tmp_path / "adapter")
    base = write_base(tmp_path / "base", dict(model.state_dict()))
    with pytest.raises(MergeError) as caught:
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert [key for key, _ in caught.value.problems] == [told[0]]
    assert told[1] in caught.value.problems[0][1]


# -- Conv1D, which stores [in, out]


def test_weight_that_is_stored_as_in_out_gets_the_transposed_delta(tmp_path):
    before = {"h.c_attn.weight": weight(48, 96), "h.c_proj.weight": weight(48, 48)}
    adapter = {**factors("h.c_attn", 96, 48), **factors("h.c_proj", 48, 48)}
    base = write_base(tmp_path / "base", before, config={"model_type": "gpt2"})
    merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter, fan_in_fan_out=True), tmp_path / "out")
    for name in ("h.c_attn", "h.c_proj"):
        exact = before[f"{name}.weight"].float() + delta(adapter, name).t()
        assert torch.equal(loaded(tmp_path / "out")[f"{name}.weight"], exact.to(torch.bfloat16))


@pytest.mark.parametrize(("flag", "kind"), [(False, "gpt2"), (True, "llama")])
def test_square_weight_is_refused_where_the_signs_contradict_each_other(tmp_path, flag, kind):
    before = {"h.up.weight": weight(96, 48), "h.c_proj.weight": weight(48, 48)}
    adapter = {**factors("h.up", 96, 48), **factors("h.c_proj", 48, 48)}
    base = write_base(tmp_path / "base", before, config={"model_type": kind})
    with pytest.raises(MergeError) as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter, fan_in_fan_out=flag), tmp_path / "out")
    assert [key for key, _ in caught.value.problems] == ["h.c_proj.weight"]
    assert "[in, out]" in caught.value.problems[0][1]
    assert not (tmp_path / "out").exists()


def test_what_lora_fx_noted_of_a_square_weight_decides(tmp_path):
    model = zoo.Mlp()
    tuned = lora_fx.apply(model, zoo.rules("fc1"), backend="modules")
    zoo.randomise_(tuned, 1)
    lora_fx.save(tuned, tmp_path / "adapter")
    state = {name: each.clone() for name, each in model.state_dict().items()}
    merge_checkpoint(write_base(tmp_path / "base", state), tmp_path / "adapter", tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), lora_fx.merge(tuned).state_dict())


# -- names


@pytest.mark.parametrize(
    ("in_base", "in_adapter"), [("model.", ""), ("", "model."), ("model.language_model.", "language_model.")]
)
def test_prefix_that_only_one_of_them_has_is_found(tmp_path, in_base, in_adapter):
    before = {f"{in_base}layers.{n}.fc.weight": weight(48, 32) for n in range(2)}
    adapter = {**factors(f"{in_adapter}layers.0.fc", 48, 32), **factors(f"{in_adapter}layers.1.fc", 48, 32)}
    base = write_base(tmp_path / "base", before)
    merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    for n in range(2):
        exact = before[f"{in_base}layers.{n}.fc.weight"].float() + delta(adapter, f"{in_adapter}layers.{n}.fc")
        assert torch.equal(loaded(tmp_path / "out")[f"{in_base}layers.{n}.fc.weight"], exact.to(torch.bfloat16))


def test_names_that_fit_under_several_prefixes_are_refused(tmp_path):
    base = write_base(tmp_path / "base", {f"{side}.fc.weight": weight(48, 32) for side in ("encoder", "decoder")})
    with pytest.raises(MergeError, match="fit the checkpoint in several ways") as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors("fc", 48, 32)), tmp_path / "out")
    assert [where for where, _ in caught.value.problems] == ["with 'decoder.' before", "with 'encoder.' before"]


def test_all_missing_names_are_told_at_once_with_near_ones(tmp_path, base):
    adapter = {**factors("model.layers.0.query", 48, 48), **factors(UP, 96, 48), **factors("model.layers.7.x", 4, 4)}
    with pytest.raises(AdapterMismatchError, match="2 of 3 adapted weights are missing") as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    missing = {key: reason for key, _, reason in caught.value.mismatches}
    assert sorted(missing) == ["model.layers.0.query.weight", "model.layers.7.x.weight"]
    assert f"nearest: {Q}.weight" in missing["model.layers.0.query.weight"]


def test_one_site_that_fits_only_elsewhere_is_not_merged_there(tmp_path):
    """`vision.fc` is not the `fc` of a text model, though its end is."""
    base = write_base(tmp_path / "base", {"fc.weight": weight(48, 32), "up.weight": weight(48, 32)})
    adapter = {**factors("up", 48, 32), **factors("vision.fc", 48, 32)}
    with pytest.raises(AdapterMismatchError) as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    assert [key for key, *_ in caught.value.mismatches] == ["vision.fc.weight"]


def test_other_shapes_are_told(tmp_path, base):
    with pytest.raises(AdapterMismatchError) as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors(UP, 96, 40)), tmp_path / "out")
    assert caught.value.mismatches == ((f"{UP}.weight", "[96, 40]", "[96, 48]"),)


def test_adapter_that_was_trained_on_another_base_is_told(tmp_path):
    model = zoo.Mlp()
    lora_fx.save(lora_fx.apply(model, zoo.rules("fc1"), backend="modules"), tmp_path / "adapter")
    other = {name: each + 1 for name, each in model.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match="is another base") as caught:
        merge_checkpoint(write_base(tmp_path / "base", other), tmp_path / "adapter", tmp_path / "out")
    assert [key for key, *_ in caught.value.mismatches] == ["fc1.weight"]


@pytest.mark.parametrize(
    "keys", [["mlp.experts.0.up_proj.weight", "mlp.experts.1.up_proj.weight"], ["mlp.experts.up_proj.weight"]]
)
def test_experts_are_refused_by_name_with_the_reason(tmp_path, keys):
    shape = (2, 48, 48) if len(keys) == 1 else (48, 48)
    base = write_base(tmp_path / "base", {key: weight(*shape) for key in keys})
    adapter = write_adapter(tmp_path / "adapter", factors("mlp.experts.up_proj", 48, 48))
    with pytest.raises((MergeError, AdapterMismatchError), match=r"mlp\.experts\.up_proj\.weight .*expert"):
        merge_checkpoint(base, adapter, tmp_path / "out")


# -- tied weights


def test_adapted_head_that_is_tied_becomes_a_tensor_of_its_own_and_is_no_longer_tied(tmp_path, sharded):
    config = {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-06}
    (sharded / "config.json").write_text(json.dumps(config))
    adapter = {**factors(Q, 48, 48), **factors("lm_head", 50, 48)}
    report = merge_checkpoint(sharded, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    before, after = loaded(sharded), loaded(tmp_path / "out")
    head = (before["model.embed_tokens.weight"].float() + delta(adapter, "lm_head")).to(torch.bfloat16)
    assert_same(after, in_memory(before, adapter, Q) | {"lm_head.weight": head})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"tie_word_embeddings": False}
    assert report.untied
    assert "tie_word_embeddings" in str(report)


def test_adapted_head_that_is_stored_is_merged_and_untied_or_it_would_be_lost_when_loaded(tmp_path):
    before = base_tensors() | {"lm_head.weight": weight(50, 48)}
    base = write_base(tmp_path / "base", before, config={"tie_word_embeddings": True})
    adapter = factors("lm_head", 50, 48)
    merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), in_memory(before, adapter, "lm_head"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_head_that_is_neither_stored_nor_tied_is_missing(tmp_path, base):
    with pytest.raises(AdapterMismatchError, match="tie_word_embeddings is false"):
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors("lm_head", 50, 48)), tmp_path / "out")


def test_untying_is_refused_where_the_forward_asks_for_it(tmp_path):
    base = write_base(
        tmp_path / "base", {"shared.weight": weight(50, 48)}, config={"model_type": "t5", "tie_word_embeddings": True}
    )
    with pytest.raises(MergeError, match="t5 computes something else"):
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors("lm_head", 50, 48)), tmp_path / "out")


def test_embedding_trained_whole_is_refused_where_the_head_would_follow(tmp_path):
    base = write_base(tmp_path / "base", base_tensors(), config={"tie_word_embeddings": True})
    tensors = factors(Q, 48, 48) | {f"{PREFIX}model.embed_tokens.weight": torch.randn(50, 48)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens"])
    with pytest.raises(MergeError, match="the head shares it"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    together = write_adapter(tmp_path / "tied", tensors, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert not merge_checkpoint(base, together, tmp_path / "out").untied


# -- refusals


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_base_is_refused_by_its_configuration(tmp_path, adapter, nested):
    quantised = {"quantization_config": {"quant_method": "gptq"}}
    base = write_base(tmp_path / "base", base_tensors(), config={"text_config": quantised} if nested else quantised)
    with pytest.raises(MergeError, match="quant_method gptq"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_weight_of_integers_is_refused_by_its_name(tmp_path):
    before = base_tensors() | {f"{UP}.weight": torch.zeros(96, 48, dtype=torch.int8)}
    base, adapter = write_base(tmp_path / "base", before), write_adapter(tmp_path / "adapter", factors(UP, 96, 48))
    with pytest.raises(MergeError, match="is stored as I8") as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert [key for key, _ in caught.value.problems] == [f"{UP}.weight"]


def test_merge_that_would_not_be_finite_names_the_tensor_and_leaves_no_checkpoint(tmp_path):
    before = {"fc.weight": torch.full((48, 32), 6e4, dtype=torch.float16)}
    adapter = {key: each.abs() * 1e3 for key, each in factors("fc", 48, 32).items()}
    base = write_base(tmp_path / "base", before)
    with pytest.raises(MergeError, match="NaN or infinite") as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    assert [key for key, _ in caught.value.problems] == ["fc.weight"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_value_too_large_for_the_out_dtype_names_the_tensor(tmp_path, adapter):
    before = base_tensors(torch.float32) | {"big": torch.tensor([1e6])}
    with pytest.raises(MergeError, match="too large for float16") as caught:
        merge_checkpoint(write_base(tmp_path / "base", before), adapter, tmp_path / "out", out_dtype="float16")
    assert [key for key, _ in caught.value.problems] == ["big"]


def test_dora_beside_another_adapter_is_refused(tmp_path, base, adapter):
    tensors = factors(Q, 48, 48) | {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(48)}
    dora = write_adapter(tmp_path / "dora", tensors, use_dora=True)
    with pytest.raises(MergeError, match="has DoRA and another adapter"):
        merge_checkpoint(base, [adapter, dora], tmp_path / "out")


def test_adapter_given_twice_is_refused(tmp_path, base, adapter):
    with pytest.raises(MergeError, match="given twice"):
        merge_checkpoint(base, [adapter, adapter / ".." / "adapter"], tmp_path / "out")
    with pytest.raises(MergeError, match="no adapter"):
        merge_checkpoint(base, [], tmp_path / "out")


def test_values_of_the_same_module_from_two_adapters_must_agree(tmp_path, base):
    folders = []
    for name in ("a", "b"):
        tensors = factors(Q, 48, 48) | {f"{PREFIX}{NORM}.weight": torch.randn(48)}
        folders.append(write_adapter(tmp_path / name, tensors, modules_to_save=["norm"]))
    with pytest.raises(MergeError, match="trained whole by several adapters"):
        merge_checkpoint(base, folders, tmp_path / "out")


def test_directory_that_is_not_ours_is_refused_before_anything_is_written(tmp_path, base, adapter):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(MergeError, match="is there already; nothing was written"):
        merge_checkpoint(base, adapter, out)
    assert contents(out) == {"mine.txt": b"mine"}
    with pytest.raises(MergeError, match="is there already, and no directory"):
        merge_checkpoint(base, adapter, out / "mine.txt")


def test_finished_merge_is_not_written_over(tmp_path, base, adapter):
    merge_checkpoint(base, adapter, tmp_path / "out")
    with pytest.raises(MergeError, match="is there already"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_result_must_lie_apart_from_the_base(base, adapter, where):
    with pytest.raises(MergeError, match="is the base itself"):
        merge_checkpoint(base, adapter, base / where)


def test_wrong_options_are_told(base, adapter, tmp_path):
    with pytest.raises(ValueError, match="out_dtype is 'int8'"):
        merge_checkpoint(base, adapter, tmp_path / "out", out_dtype="int8")
    with pytest.raises(ValueError, match="rounding is 'up'"):
        merge_checkpoint(base, adapter, tmp_path / "out", rounding="up")


def test_what_is_no_adapter_or_no_checkpoint_is_told(tmp_path, base, adapter):
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: does not exist"):
        merge_checkpoint(base, base, tmp_path / "out")
    with pytest.raises(MergeError, match=r"has no model\.safetensors"):
        merge_checkpoint(adapter, adapter, tmp_path / "out")
    with pytest.raises(MergeError, match="is no directory"):
        merge_checkpoint(tmp_path / "nowhere", adapter, tmp_path / "out")


# -- damaged checkpoints


def header_of(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **more}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "a header of 0 bytes"),
        ((10**12).to_bytes(8, "little"), "a header of 1,000,000,000,000 bytes"),
        (header_of(b"nonsense"), "Expecting value"),
        (header_of([1]), "no JSON object"),
        (header_of(b'{"a": 1, "a": 2}'), "twice"),
        (header_of({"a": 1}), "describes no tensor"),
        (header_of(one(dtype="X9"), bytes(8)), "describes no tensor"),
        (header_of(one(shape=(-2,)), bytes(8)), "not below 0"),
        (header_of(one(shape=(3,)), bytes(8)), "does not take 8 bytes"),
        (header_of(one(offsets=(4, 12)), bytes(12)), "begins at byte 4, not at 0"),
        (header_of(one(), bytes(9)), "describes 8 bytes, the file has 9"),
        (header_of(one(), bytes(7)), "describes 8 bytes, the file has 7"),
        (header_of(one(b={"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}), bytes(8)), "b begins at byte 4"),
        (header_of(one(__metadata__={"a": 1}), bytes(8)), "no table of strings"),
    ],
)
def test_damaged_file_is_told_before_anything_is_written(tmp_path, base, adapter, content, told):
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(MergeError) as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", ".hidden.safetensors", "model.bin"])
def test_index_may_name_only_files_beside_it(tmp_path, sharded, adapter, file):
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(MergeError, match="which is no safetensors file beside it"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")


def test_index_that_contradicts_the_files_is_told(tmp_path, sharded, adapter):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(MergeError, match="contradicts the files") as caught:
        merge_checkpoint(sharded, adapter, tmp_path / "out")
    assert caught.value.problems == (("more", "is not in model-00001-of-00002.safetensors"),)


def test_tensor_in_two_files_is_told(tmp_path, sharded, adapter):
    tensors = loaded(sharded)
    save_file({f"{Q}.weight": tensors[f"{Q}.weight"], "steps": tensors["steps"]}, sharded / "x.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["steps"] = "x.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match="tensors in two files"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")


def test_two_checkpoints_in_one_directory_are_ambiguous(tmp_path, sharded, adapter):
    save_file(loaded(sharded), sharded / "model.safetensors")
    with pytest.raises(MergeError, match="which checkpoint is meant"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")


# -- what is carried over


def test_folders_are_carried_and_weights_in_other_forms_are_left_out(tmp_path, base, adapter):
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "model.gguf", "adapter_config.json", ".hidden"):
        (base / name).write_text("x")
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    names = ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(contents(tmp_path / "out")) == names
    assert report.left_out == ("model.gguf", "pytorch_model.bin")
    assert "pytorch_model.bin" in str(report)


def test_links_of_a_cache_become_files(tmp_path, base, adapter, both):
    (tmp_path / "blob").write_bytes((base / "model.safetensors").read_bytes())
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(tmp_path / "blob")
    before = contents(tmp_path / "base")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert contents(base) == before


# -- dtypes and rounding


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_out_dtype_is_that_of_all_floats_rounded_once_and_config_says_so(tmp_path, adapter, both, dtype, shards):
    tensors = base_tensors(torch.float32)
    parts = (
        [tensors] if shards == 1 else [{"steps": tensors["steps"]}, {k: v for k, v in tensors.items() if k != "steps"}]
    )
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "hidden_size": 48}}
    base = write_base(tmp_path / "base", *parts, config=config)
    merge_checkpoint(base, adapter, tmp_path / "out", out_dtype=dtype)
    kind = getattr(torch, dtype)
    exact = in_memory(tensors, both, Q, UP)
    expected = {name: each.to(kind) if each.is_floating_point() else each for name, each in exact.items()}
    assert_same(loaded(tmp_path / "out"), expected)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["torch_dtype"], written["text_config"]) == (dtype, {"dtype": dtype, "hidden_size": 48})
    if shards == 2:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(each.nbytes for each in expected.values())


HALVES = (torch.bfloat16, torch.float16)


def test_tensors_of_changed_files_begin_at_multiples_of_their_size(tmp_path, adapter):
    before = {**base_tensors(torch.float32), "odd": torch.randn(3), "wide": torch.arange(5)}
    merge_checkpoint(write_base(tmp_path / "base", before), adapter, tmp_path / "out", out_dtype="float16")
    file = read_raw(tmp_path / "out" / "model.safetensors")
    assert file.data_start % 8 == 0
    for name, entry in file.tensors.items():
        assert entry.start % loaded(tmp_path / "out")[name].itemsize == 0


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((each, dtype) for each in (1.00123, -0.3337, -5.1e-8, 0.0, 1.0, 60001.0) for dtype in HALVES),
        (3e-39, torch.bfloat16),  # below the normal numbers
        (3e-9, torch.float16),
    ],
)
def test_stochastic_rounding_gives_one_of_the_two_neighbours_and_is_right_in_the_mean(value, dtype):
    wide = torch.full((1 << 16,), value)
    out = torch.empty_like(wide, dtype=dtype)
    round_into(wide, out, Noise(0, "w"), 0)
    found = out.double().unique()
    nearest = torch.tensor(value).to(dtype).double()
    assert nearest in found
    assert len(found) == (1 if nearest == torch.tensor(value).double() else 2)
    gap = float(found.max() - found.min())
    assert abs(float(out.double().mean()) - float(wide[0].double())) <= 4 * gap / 2 / 2**8


def test_stochastic_rounding_does_not_depend_on_how_a_tensor_is_cut_up():
    wide, whole = torch.randn(5000), torch.empty(5000, dtype=torch.bfloat16)
    round_into(wide, whole, Noise(3, "w"), 0)
    for size in (1, 7, 8, 4096):
        parts = torch.empty_like(whole)
        for start in range(0, 5000, size):
            round_into(wide[start : start + size], parts[start : start + size], Noise(3, "w"), start)
        assert torch.equal(parts, whole)


def test_noise_differs_between_tensors_and_seeds():
    first = Noise(0, "a").uniform(0, 100)
    assert not torch.equal(first, Noise(0, "b").uniform(0, 100))
    assert not torch.equal(first, Noise(1, "a").uniform(0, 100))
    assert 0 <= float(first.min()) <= float(first.max()) < 1


def test_what_overflows_stays_infinite_under_stochastic_rounding():
    out = torch.empty(2, dtype=torch.float16)
    round_into(torch.tensor([1e6, -1e6]), out, Noise(0, "w"), 0)
    assert out.tolist() == [float("inf"), float("-inf")]


def test_small_delta_is_lost_to_the_nearest_and_survives_stochastic_rounding(tmp_path):
    before = {"fc.weight": torch.ones(256, 256, dtype=torch.bfloat16)}
    adapter = {key: each.abs() * 0.01 for key, each in factors("fc", 256, 256).items()}
    base, folder = write_base(tmp_path / "base", before), write_adapter(tmp_path / "adapter", adapter)
    (nearest,) = merge_checkpoint(base, folder, tmp_path / "a").tensors
    (stochastic,) = merge_checkpoint(base, folder, tmp_path / "b", rounding="stochastic").tensors
    assert nearest.survived == 0
    assert abs(stochastic.survived - 1) < 0.2
    exact = float(delta(adapter, "fc").norm() / before["fc.weight"].float().norm())
    assert abs(nearest.relative_delta - exact) < 1e-5 * exact


def test_same_seed_gives_the_same_bytes(tmp_path, base, adapter):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge_checkpoint(base, adapter, tmp_path / name, rounding="stochastic", seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


# -- tiles


SHAPES = [(1, 1), (512, 768), (333, 1001), (64, 4096), (1000, 48), (20, 40000), (700, 17000), (40000, 20)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 16, 300])
def test_tiles_cover_a_matrix_once_and_are_small(shape, rank):
    seen = torch.zeros(shape, dtype=torch.int8)
    for tile in tiles.tiles(*shape, rank):
        seen[tile.rows, tile.columns] += 1
        assert tile.elements <= 2 * tiles.TILE
        runs = list(tile.runs())
        assert sum(number for *_, number in runs) == tile.elements
    assert bool((seen == 1).all())


@pytest.mark.parametrize("shape", [s for s in SHAPES if min(s) >= 16])
@pytest.mark.parametrize("rank", [1, 7, 16, 128])
@pytest.mark.parametrize("stored", ["out_in", "in_out"])
def test_tiles_have_the_bits_of_one_product(tmp_path, shape, rank, stored):
    out, inputs = shape
    before = torch.randn(shape)
    adapter = factors("fc", out, inputs, rank)
    tensors = {"fc.weight": before if stored == "out_in" else before.t().contiguous()}
    folder = write_adapter(
        tmp_path / "adapter", adapter, r=rank, lora_alpha=3 * rank, fan_in_fan_out=stored == "in_out"
    )
    merge_checkpoint(write_base(tmp_path / "base", tensors), folder, tmp_path / "out")
    found = loaded(tmp_path / "out")["fc.weight"]
    expected = in_memory({"fc.weight": before}, adapter, "fc", scaling=3.0)["fc.weight"]
    assert torch.equal(found if stored == "out_in" else found.t(), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads_does_not_change_the_bytes_and_is_restored(tmp_path, sharded, adapter, threads):
    merge_checkpoint(sharded, adapter, tmp_path / "one")
    torch.set_num_threads(threads)
    merge_checkpoint(sharded, adapter, tmp_path / "several")
    assert torch.get_num_threads() == threads
    assert contents(tmp_path / "one") == contents(tmp_path / "several")


def test_systems_without_positional_reads_or_copies_in_the_kernel_give_the_same_bytes(
    tmp_path, sharded, adapter, monkeypatch
):
    merge_checkpoint(sharded, adapter, tmp_path / "a")
    monkeypatch.setattr(rawbytes, "_POSITIONAL", False)
    monkeypatch.setattr(rawbytes, "_IN_KERNEL", False)
    monkeypatch.setattr(rawbytes, "_CHUNK", 100)
    merge_checkpoint(sharded, adapter, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_file_systems_that_cannot_copy_among_themselves_give_the_same_bytes(tmp_path, sharded, adapter, monkeypatch):
    merge_checkpoint(sharded, adapter, tmp_path / "a")
    monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    merge_checkpoint(sharded, adapter, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


# -- interruptions


class StopError(Exception):
    pass


def stop_after(calls):
    """Return a progress that ends the merge when it has been told so many things."""
    left = [calls]

    def progress(*_):
        left[0] -= 1
        if left[0] < 0:
            raise StopError

    return progress


def looks_complete(folder: Path) -> bool:
    return (folder / "config.json").exists()


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "out_dtype": "float16"}], ids=["plain", "cast"])
def test_merge_stopped_anywhere_is_continued_to_the_same_bytes(tmp_path, sharded, adapter, options):
    told = []
    whole = merge_checkpoint(sharded, adapter, tmp_path / "whole", **options, progress=lambda *each: told.append(each))
    assert len(told) > 5
    for calls in range(len(told)):
        out = tmp_path / f"out{calls}"
        with pytest.raises(StopError):
            merge_checkpoint(sharded, adapter, out, **options, progress=stop_after(calls))
        assert not looks_complete(out)
        assert (out / outfolder.JOURNAL).exists()
        report = merge_checkpoint(sharded, adapter, out, **options)
        assert contents(out) == contents(tmp_path / "whole")
        assert report.tensors == whole.tensors


def test_finished_shards_are_not_written_again(tmp_path, sharded, adapter):
    out, first = tmp_path / "out", "model-00001-of-00002.safetensors"
    size = (sharded / first).stat().st_size

    def stop(done, _, __):
        if done > size:
            raise StopError

    with pytest.raises(StopError):
        merge_checkpoint(sharded, adapter, out, progress=stop)
    before = (out / first).stat().st_mtime_ns
    merge_checkpoint(sharded, adapter, out)
    assert (out / first).stat().st_mtime_ns == before


def test_unfinished_merge_is_continued_by_the_same_inputs_only(tmp_path, sharded, adapter):
    out = tmp_path / "out"
    with pytest.raises(StopError):
        merge_checkpoint(sharded, adapter, out, progress=stop_after(1))
    before = contents(out)
    with pytest.raises(MergeError, match="an unfinished merge of something else") as caught:
        merge_checkpoint(sharded, adapter, out, rounding="stochastic", seed=4)
    assert [key for key, _ in caught.value.problems] == ["rounding", "seed"]
    other = write_adapter(tmp_path / "other", factors(Q, 48, 48))
    with pytest.raises(MergeError, match="adapters"):
        merge_checkpoint(sharded, other, out)
    os.utime(sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(MergeError, match="base"):
        merge_checkpoint(sharded, adapter, out)
    assert contents(out) == before


def test_damaged_journal_is_told(tmp_path, base, adapter):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / outfolder.JOURNAL).write_text('{"shards": {"a": 1}}')
    with pytest.raises(MergeError, match="is damaged"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_leftovers_of_a_start_that_was_killed_do_not_hinder(tmp_path, base, adapter):
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{outfolder.OURS}.x.part").write_text("half")
    merge_checkpoint(base, adapter, out)
    assert looks_complete(out)


def test_two_merges_into_one_directory_do_not_meet(tmp_path, base, adapter):
    (tmp_path / "out").mkdir()
    with outfolder.locked(tmp_path / "out"), pytest.raises(MergeError, match="another process is merging into it"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("threads", [1, 2])
def test_full_disk_is_told_and_the_merge_can_be_continued(tmp_path, sharded, adapter, monkeypatch, threads):
    out = tmp_path / "out"
    torch.set_num_threads(threads)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(MergeError, match="the disk is full") as caught:
            merge_checkpoint(sharded, adapter, out)
    assert "make room and merge again with the same arguments" in str(caught.value)
    assert not looks_complete(out)
    assert not list(out.glob("*.part"))
    merge_checkpoint(sharded, adapter, out)
    merge_checkpoint(sharded, adapter, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_error_while_syncing_is_told(tmp_path, sharded, adapter, monkeypatch):
    monkeypatch.setattr(rawbytes.RawBytes, "sync", failing(errno.EIO))
    with pytest.raises(MergeError, match="cannot be finished: Input/output error"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")
    assert not looks_complete(tmp_path / "out")


def test_too_little_room_is_told_before_anything_is_written(tmp_path, base, adapter, monkeypatch):
    monkeypatch.setattr(streaming, "free_bytes", lambda folder: 1000)
    with pytest.raises(MergeError, match="too little room; nothing was written"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- progress and the command line


@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_progress_ends_with_all_bytes(tmp_path, sharded, adapter, out_dtype):
    told = []
    merge_checkpoint(sharded, adapter, tmp_path / "out", out_dtype=out_dtype, progress=lambda *each: told.append(each))
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert told[-1][:2] == (total, total)
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)


def run(*words: object):
    return CliRunner().invoke(lora_fx.cli.main, [str(word) for word in words])


@pytest.fixture(autouse=True)
def _cli():
    import lora_fx.cli  # noqa: F401


def test_command_merges_and_tells_what_it_did(tmp_path, base, adapter):
    result = run("merge", base, adapter, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"{tmp_path / 'out'}: 2 merged, 3 untouched"
    assert "survived" in result.stdout
    merge_checkpoint(base, adapter, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_command_gives_json_and_takes_several_adapters(tmp_path, base, adapter):
    second = write_adapter(tmp_path / "second", factors(Q, 48, 48))
    result = run("merge", base, adapter, second, "-o", tmp_path / "out", "--format", "json", "--no-progress")
    assert result.exit_code == 0, result.output
    assert [len(each["adapters"]) for each in json.loads(result.stdout)["tensors"]] in ([2, 1], [1, 2])
    assert result.stderr == ""


def test_command_tells_what_is_wrong_and_ends_with_2(tmp_path, base, adapter):
    result = run("merge", base, tmp_path / "none", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "adapter_config.json: does not exist" in result.stderr
    assert "Traceback" not in result.stderr


# -- slow ones


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from lora_fx import merge_checkpoint
from tests.support.merging import contents

base, adapter, whole, out = map(Path, sys.argv[1:])
started = time.perf_counter()
merge_checkpoint(base, adapter, whole, rounding="stochastic")
seconds = time.perf_counter() - started
expected = contents(whole)
chance = random.Random(0)
kills = finished = 0
while kills < 20:
    child = os.fork()
    if child == 0:
        merge_checkpoint(base, adapter, out, rounding="stochastic")
        os._exit(0)
    time.sleep(chance.uniform(0, 0.7 * seconds))
    os.kill(child, signal.SIGKILL)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    kills += killed
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if "config.json" in names:
        assert {name: data for name, data in contents(out).items() if not name.startswith(".")} == expected
    if not killed:
        assert contents(out) == expected
        finished += 1
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
if (out / ".lora-fx-merge.json").exists() or not out.exists() or not any(out.iterdir()):
    merge_checkpoint(base, adapter, out, rounding="stochastic")
assert contents(out) == expected
print(kills, "kills,", finished, "finished between them")
"""


@pytest.mark.slow
def test_merge_killed_at_twenty_random_moments_gives_the_same_bytes(tmp_path):
    shards = [{f"layers.{n}.fc.weight": weight(1024, 2048), f"layers.{n}.norm": weight(1024)} for n in range(12)]
    adapter = {key: each for n in range(12) for key, each in factors(f"layers.{n}.fc", 1024, 2048).items()}
    paths = write_base(tmp_path / "base", *shards), write_adapter(tmp_path / "adapter", adapter)
    command = [sys.executable, "-c", KILLED, *map(str, paths), str(tmp_path / "whole"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20 kills")


MEMORY = """
import sys
import lora_fx
merge = lora_fx.merge_checkpoint
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
idle = status("VmRSS")
merge(*sys.argv[1:4], rounding=sys.argv[4])
print(status("VmHWM") - idle)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(16, 1 << 23), (1 << 13, 1 << 14), (1 << 23, 16)], ids=["wide", "square", "high"])
def test_memory_stays_below_64_mib_whatever_the_shape(tmp_path, shape, rounding):
    """A quarter of a gigabyte in one tensor; the adapter is half precision, so that its upcast would show."""
    tensors = {"fc.weight": torch.zeros(shape, dtype=torch.bfloat16), "other": torch.zeros(1 << 26, dtype=torch.uint8)}
    adapter = {key: each.bfloat16() for key, each in factors("fc", *shape, r=1 if 16 in shape else 64).items()}
    base = write_base(tmp_path / "base", tensors)
    folder = write_adapter(tmp_path / "adapter", adapter, r=1 if 16 in shape else 64)
    own = sum(each.nbytes for each in adapter.values())
    command = [sys.executable, "-c", MEMORY, str(base), str(folder), str(tmp_path / "out"), rounding]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) * 1024 - own <= 64 << 20
