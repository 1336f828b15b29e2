"""Adapters for llama.cpp, checked in llama.cpp itself: what it computes with them is what we compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

import gguf
import numpy as np

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.exporters import Exported, export
from lora_fx.exporters import gguf as target
from lora_fx.exporters.gguf import LAYOUTS
from lora_fx.models.samples import Sample
from tests.support.ggufbase import SETTINGS, language_model, prompts, write_base
from tests.support.zoo import randomise_, rules

LOGITS = 1e-2
"""Largest difference of logits of order ten; without half precision in its cache, llama.cpp stays far below it."""
EFFECT = 0.5
"""An adapter of these tests changes the logits by at least so much."""
LINEARS = {"match": {"name": "model.layers.**", "op": "linear"}, "lora": {"r": 4, "alpha": 8}}
ENDS = {"match": {"name": ["model.embed_tokens", "lm_head"]}, "lora": {"r": 2, "alpha": 3, "rslora": True}}
NARROW = {"match": {"name": "model.layers.1.**.{q,k,down}_proj"}, "lora": {"r": 3, "alpha": 24}}


def adapted(kind: str, *chosen: dict[str, Any], **settings: Any) -> nn.Module:
    """Return a tiny language model with random adapters as the rules say."""
    tuned = lora_fx.apply(language_model(kind, **settings), {"version": 1, "rules": list(chosen)}, backend="modules")
    randomise_(tuned)
    return tuned


def in_llama_cpp(kind: str, tuned: nn.Module, folder: Path) -> Exported:
    """Export the adapter and compare; also the base model alone."""
    base = folder / "base.gguf"
    write_base(kind, language_model(kind), base)
    return export(tuned, folder / "adapter.gguf", "gguf", Sample((), prompts()), verify=True, base=base)


def assert_computes_the_same(exported: Exported) -> None:
    assert exported.difference is not None
    assert exported.difference <= LOGITS
    assert exported.effect >= EFFECT


def written(tuned: nn.Module, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    """Return alpha and the tensors of the file, as numpy has them."""
    export(tuned, folder / "adapter.gguf", "gguf")
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    return float(reader.fields["adapter.lora.alpha"].contents()), tensors


def test_every_linear_head_and_embedding_of_llama_with_several_ranks_alphas_and_rslora(tmp_path: Path):
    exported = in_llama_cpp("Llama", adapted("Llama", NARROW, LINEARS, ENDS), tmp_path)
    assert_computes_the_same(exported)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "Llama"])
def test_every_linear_of_other_architectures(kind: str, tmp_path: Path):
    tied = language_model(kind).config.tie_word_embeddings
    assert_computes_the_same(in_llama_cpp(kind, adapted(kind, LINEARS, *([] if tied else [ENDS])), tmp_path))


def test_all_architectures_that_are_allowed_are_tested():
    assert {f"{kind}ForCausalLM" for kind in SETTINGS} == set(LAYOUTS)


@pytest.mark.slow
def test_without_the_permutation_of_q_and_k_the_file_loads_and_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(target, "permuted_rows", lambda rows, heads: rows)
    with pytest.raises(ExportError, match=r"llama.cpp computes something else; nothing was written") as caught:
        in_llama_cpp("Llama", adapted("Llama", LINEARS), tmp_path)
    assert float(dict(caught.value.facts)["max |Δ|"]) > 0.1
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.slow
def test_with_one_alpha_for_mixed_scalings_the_file_loads_and_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "_common", lambda alphas: 8.0)
    monkeypatch.setattr(target.PlainAdapter, "alpha", property(lambda adapter: 8.0))
    with pytest.raises(ExportError, match=r"llama.cpp computes something else") as caught:
        in_llama_cpp("Llama", adapted("Llama", NARROW, LINEARS), tmp_path)
    assert float(dict(caught.value.facts)["max |Δ|"]) > 0.1


@pytest.mark.slow
def test_parts_of_fused_weights(tmp_path: Path):
    parts = {"of": {"q": 64, "k": 32, "v": 32}, "adapt": ["q", "v"]}
    fused = {"match": {"name": "**.qkv_proj"}, "lora": {"r": 4, "alpha": 8}, "slices": parts}
    tuned = adapted("Phi3", fused, LINEARS)
    assert_computes_the_same(in_llama_cpp("Phi3", tuned, tmp_path))
    _, tensors = written(tuned, tmp_path)
    assert tensors["blk.0.attn_qkv.weight.lora_b"].shape == (128, 8)
    assert not tensors["blk.0.attn_qkv.weight.lora_b"][64:96].any()


@pytest.mark.slow
def test_adapters_of_several_names_are_one_file(tmp_path: Path):
    named = {"match": {"name": "**.{q,v}_proj"}, "lora": {"r": 4, "alpha": 8, "adapter": "other"}}
    assert_computes_the_same(in_llama_cpp("Llama", adapted("Llama", named, LINEARS), tmp_path))


def test_alpha_is_that_of_most_sites_and_the_rest_of_a_scaling_is_in_B(tmp_path: Path):
    tuned = adapted("Llama", NARROW, LINEARS)
    alpha, tensors = written(tuned, tmp_path)
    assert alpha == 8
    usual, other = (tuned.get_submodule(f"model.layers.{layer}.mlp.down_proj") for layer in (0, 1))
    assert np.array_equal(tensors["blk.0.ffn_down.weight.lora_a"], usual.lora_A.default.weight.detach().numpy())
    assert np.array_equal(tensors["blk.0.ffn_down.weight.lora_b"], usual.lora_B.default.weight.detach().numpy())
    assert tensors["blk.1.ffn_down.weight.lora_a"].shape == (3, 96)
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], 3 * other.lora_B.default.weight.detach().numpy())


def test_file_says_what_it_is(tmp_path: Path):
    written(adapted("Qwen2", LINEARS), tmp_path)
    fields = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    content = {name: fields[name].contents() for name in ("general.architecture", "general.type", "adapter.type")}
    assert content == {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora"}


REFUSED = {
    "llama.cpp knows no DoRA": ("Llama", rules("**.q_proj", dora=True)),
    "an adapter in GGUF holds no biases": ("Qwen2", rules("**.q_proj", bias=True)),
    "an adapter in GGUF holds no whole modules": ("Llama", rules("**.q_proj", train=["lm_head"])),
    "its weight is tied": ("Gemma", rules("model.embed_tokens")),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.filterwarnings("ignore::lora_fx.errors.LoraFxWarning")
def test_what_llama_cpp_does_not_apply_is_refused_with_the_nearest_exact_way(reason: str, tmp_path: Path):
    kind, chosen = REFUSED[reason]
    tuned = lora_fx.apply(language_model(kind), chosen, backend="modules")
    with pytest.raises(ExportError) as caught:
        export(tuned, tmp_path / "adapter.gguf", "gguf")
    assert all(reason in fact[1] for fact in caught.value.facts)
    assert all("merge the adapter" in fact[1] for fact in caught.value.facts)
    assert list(tmp_path.iterdir()) == []


def test_architecture_whose_layout_was_never_tested_is_refused(tmp_path: Path):
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(4, 4)), rules("**"), backend="modules")
    with pytest.raises(ExportError, match=r"the layout of Sequential in GGUF has not been tested, only that of Llama"):
        export(tuned, tmp_path / "adapter.gguf", "gguf")


def test_verifying_needs_the_base_as_gguf(tmp_path: Path):
    with pytest.raises(ExportError, match=r"needs the base model as a GGUF file\n  give base='model.gguf'"):
        export(adapted("Llama", LINEARS), tmp_path / "adapter.gguf", "gguf", Sample((), prompts()), verify=True)


def test_padding_is_no_part_of_a_prompt():
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    given = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    result = target.prompts_in(language_model("Llama"), Sample((), given))
    assert result == [[5, 6, 7], [8, 9], [5, 6], [8]]
