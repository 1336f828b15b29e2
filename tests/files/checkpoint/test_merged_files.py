"""Adapters merged into checkpoints on disk: the same bits as in memory, for every kind of site."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import merge_checkpoint
from lora_fx.adapters.factors.dora import DoRAMagnitude
from lora_fx.errors import MergeError
from lora_fx.files.checkpoint import tiles
from lora_fx.files.safetensors import read_raw
from lora_fx.rules.keys import OPS
from tests.support import zoo
from tests.support.merging import (
    NORM,
    PREFIX,
    UP,
    Q,
    assert_same,
    base_tensors,
    contents,
    delta,
    factors,
    in_memory,
    loaded,
    weight,
    write_adapter,
    write_base,
)

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
    before, after = (contents(folder)["model.safetensors"] for folder in (base, tmp_path / "out"))
    file = read_raw(base / "model.safetensors")
    start, end = (file.data_start + size for size in file.tensors[f"{UP}.weight"][2:])
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
    assert [row.how for row in report.tensors] == 6 * ["merged"]
    loaded_model, expected = LlamaForCausalLM.from_pretrained(tmp_path / "out"), lora_fx.merge(tuned)
    assert_same(loaded_model.state_dict(), expected.state_dict())


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
    assert {row.name: len(row.adapters) for row in report.tensors} == {f"{Q}.weight": 2, f"{UP}.weight": 1}


def test_dora_scales_each_output_to_its_length(tmp_path, base, both):
    lengths = {path: torch.rand(both[f"{PREFIX}{path}.lora_B.weight"].shape[0]) + 0.5 for path in (Q, UP)}
    tensors = both | {f"{PREFIX}{path}.lora_magnitude_vector": length for path, length in lengths.items()}
    merge_checkpoint(base, write_adapter(tmp_path / "adapter", tensors, use_dora=True), tmp_path / "out")
    before, after = loaded(base), loaded(tmp_path / "out")
    for path, length in lengths.items():
        A, B = (both[f"{PREFIX}{path}.lora_{name}.weight"] for name in "AB")
        expected = DoRAMagnitude(length, 1.5).merged(before[f"{path}.weight"], A, B)
        assert torch.equal(after[f"{path}.weight"], expected)


def test_dora_on_weights_whose_outputs_lie_in_several_tiles(tmp_path, monkeypatch):
    """Conv1D stores [in, out], and rows may be longer than a tile: the lengths are found in a pass of their own."""
    monkeypatch.setattr(tiles, "_WIDEST", 64)
    before = {"a.weight": weight(48, 200, dtype=torch.float32), "b.weight": weight(40, 200, dtype=torch.float32)}
    adapter = {**factors("a", 200, 48), **factors("b", 40, 200)}
    lengths = {"a": torch.rand(200) + 0.5, "b": torch.rand(40) + 0.5}
    tensors = adapter | {f"{PREFIX}{path}.lora_magnitude_vector": length for path, length in lengths.items()}
    folder = write_adapter(tmp_path / "adapter", tensors, use_dora=True, fan_in_fan_out=True)
    merge_checkpoint(write_base(tmp_path / "base", before), folder, tmp_path / "out")
    after = loaded(tmp_path / "out")
    for path, length in lengths.items():
        A, B = (adapter[f"{PREFIX}{path}.lora_{name}.weight"] for name in "AB")
        stored = before[f"{path}.weight"].t() if path == "a" else before[f"{path}.weight"]
        expected = DoRAMagnitude(length, 1.5).merged(stored, A, B)
        merged_weight = after[f"{path}.weight"].t() if path == "a" else after[f"{path}.weight"]
        torch.testing.assert_close(merged_weight, expected, rtol=1e-6, atol=0)


def test_trained_bias_and_whole_modules_replace_the_bases_and_are_rounded_to_its_dtype(tmp_path):
    before = base_tensors() | {f"{Q}.bias": weight(48)}
    norm, bias = torch.randn(48), torch.randn(48)
    tensors = factors(Q, 48, 48) | {f"{PREFIX}{Q}.base_layer.bias": bias, f"{PREFIX}{NORM}.weight": norm}
    folder = write_adapter(tmp_path / "adapter", tensors, bias="lora_only", modules_to_save=["norm"])
    report = merge_checkpoint(write_base(tmp_path / "base", before), folder, tmp_path / "out")
    after = loaded(tmp_path / "out")
    assert torch.equal(after[f"{Q}.bias"], bias.to(torch.bfloat16))
    assert torch.equal(after[f"{NORM}.weight"], norm.to(torch.bfloat16))
    assert sorted(row.how for row in report.tensors) == ["merged", "replaced", "replaced"]


@pytest.mark.parametrize("shards", [1, 2])
def test_new_head_that_the_base_has_not_is_added_in_its_own_dtype(tmp_path, shards):
    tensors = base_tensors()
    parts = [tensors] if shards == 1 else [{"steps": tensors.pop("steps")}, tensors]
    head = torch.randn(3, 48)
    adapter = factors(Q, 48, 48) | {f"{PREFIX}score.weight": head}
    folder = write_adapter(tmp_path / "adapter", adapter, modules_to_save=["score"])
    report = merge_checkpoint(write_base(tmp_path / "base", *parts), folder, tmp_path / "out")
    expected = {name: tensor for part in parts for name, tensor in part.items()} | {"score.weight": head}
    assert_same(loaded(tmp_path / "out"), in_memory(expected, adapter, Q))
    assert [row.name for row in report.tensors if row.how == "added"] == ["score.weight"]
    if shards == 2:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


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
    base = write_base(tmp_path / "base", {name: value.clone() for name, value in model.state_dict().items()})
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert sorted(row.name for row in report.tensors) == [
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
        (
            nn.Sequential(nn.Conv1d(8, 8, 3, groups=2)),
            torch.zeros(1, 8, 9),
            {},
            ("0.weight", "a convolution in 2 groups"),
        ),
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
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merge_checkpoint(write_base(tmp_path / "base", state), tmp_path / "adapter", tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), lora_fx.merge(tuned).state_dict())
