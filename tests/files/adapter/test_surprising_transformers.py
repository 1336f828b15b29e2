"""What transformers does with files otherwise than one would guess: each shown beside what lora_fx does.

A test that shows a client's own behaviour fails where it has been repaired: `docs/clients.md` then says too much.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import lora_fx
from lora_fx.cli.models.spec import ModelSpecError, load_model
from lora_fx.errors import AdapterMismatchError, LoraFxWarning, MergeError
from tests.files.adapter.test_peft_forms import Q, written
from tests.support.around import STRICT_IN_FILES, assert_close, filled, llama, logits
from tests.support.kinds import EFFECT, OUTPUT, built, computed, distance, from_file_in_peft, in_ours
from tests.support.peftkinds import IDS, mixtral
from tests.support.zoo import rules

pytestmark = STRICT_IN_FILES


# -- transformers

Q_ONLY = {"version": 1, "rules": [{"match": {"name": "**.q_proj"}, "lora": {"r": 2, "alpha": 4}}]}


def in_half(wide: str) -> nn.Module:
    model = llama().bfloat16()
    model.get_submodule(wide).float()
    return model


def test_merged_model_of_two_dtypes_is_told_of_as_it_would_be_rounded(tmp_path):
    tuned = lora_fx.apply(in_half("lm_head"), Q_ONLY)
    with pytest.warns(LoraFxWarning, match=r"all, bfloat16, .*: lm_head.weight \(float32\); from_pretrained\(dtype="):
        merged = lora_fx.merge(tuned)
    merged.save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b.float()) for a, b in zip(exact.parameters(), merged.parameters(), strict=True))
    with pytest.warns(LoraFxWarning, match=r"lm_head.weight \(float32\)"):
        lora_fx.export(tuned, tmp_path / "x", "merged")


def test_merged_model_of_which_nothing_is_rounded_is_no_matter(monkeypatch):
    lora_fx.merge(lora_fx.apply(llama().bfloat16(), Q_ONLY))
    lora_fx.merge(lora_fx.apply(in_half("model.embed_tokens"), Q_ONLY))  # the first: all is read in float32
    codes = llama().bfloat16()
    codes.model.layers[0].mlp.up_proj.weight.data = codes.model.layers[0].mlp.up_proj.weight.to(torch.float8_e4m3fn)
    lora_fx.merge(lora_fx.apply(codes, Q_ONLY))
    apart = in_half("lm_head")
    apart._keep_in_fp32_modules_strict = {"lm_head"}  # as transformers notes what the parts of a model keep apart
    lora_fx.merge(lora_fx.apply(apart, Q_ONLY))
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["lm_head"])
    lora_fx.merge(lora_fx.apply(in_half("lm_head"), Q_ONLY))


def test_streamed_merge_tells_what_config_json_lets_nobody_read(tmp_path, monkeypatch):
    in_half("lm_head").save_pretrained(tmp_path / "base")
    chosen = Q_ONLY | {"rules": [{"match": {"name": ["lm_head", "**.q_proj"]}, "lora": {"r": 2}}]}
    lora_fx.save(filled(lora_fx.apply(in_half("lm_head"), chosen)), tmp_path / "both")
    with pytest.warns(LoraFxWarning, match=r"all, bfloat16, .*: lm_head.weight \(float32\)"):
        lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "both", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "both", tmp_path / "half", out_dtype="bfloat16")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["lm_head"])
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "both", tmp_path / "kept")
    lora_fx.save(filled(lora_fx.apply(in_half("lm_head"), Q_ONLY)), tmp_path / "q")
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "q", tmp_path / "other")  # the head is the base's own matter


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ranks, scalings": {
        "rules": [
            {"match": {"name": "**.q_proj"}, "lora": {"r": 2, "alpha": 3, "rslora": True}},
            {"match": {"name": "**.{v,up}_proj"}, "lora": {"r": 4, "alpha": 1}},
        ]
    },
    "embedding and head": {"rules": [{"match": {"name": ["model.embed_tokens", "lm_head"]}, "lora": {"r": 2}}]},
    "head trained whole": {"rules": Q_ONLY["rules"], "train": ["lm_head"]},
}


@pytest.mark.parametrize("chosen", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_load_adapter_of_transformers_reads_what_we_write(chosen, tmp_path):
    tuned = filled(lora_fx.apply(llama(), {"version": 1, **chosen}))
    lora_fx.save(tuned, tmp_path)
    model = llama()
    model.load_adapter(str(tmp_path))
    assert_close(logits(model), logits(tuned))


def test_load_adapter_of_transformers_drops_the_lengths_of_dora(tmp_path):
    """Also those of PEFT's own files: read them with PEFT, or merge."""
    chosen = Q_ONLY | {"rules": [{"match": {"name": "**.q_proj"}, "lora": {"r": 2, "dora": True}}]}
    tuned = filled(lora_fx.apply(llama(), chosen))
    lora_fx.save(tuned, tmp_path / "ours")
    theirs = written(llama(), tmp_path / "theirs", target_modules=Q, use_dora=True)
    for folder, wanted in (("ours", logits(tuned)), ("theirs", logits(theirs))):
        model = llama()
        model.load_adapter(str(tmp_path / folder))
        assert distance(logits(model), wanted) > EFFECT
        assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / folder).eval()), wanted)
        assert_close(logits(lora_fx.load(llama(), tmp_path / folder)), wanted)


def test_adapter_that_transformers_writes_is_read_and_what_it_leaves_behind_is_refused(tmp_path):
    model = llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=[*Q, "lm_head"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert_close(logits(lora_fx.load(llama(), tmp_path / "adapter")), logits(model))
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "base")
    assert distance(logits(LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()), logits(llama())) > EFFECT
    with pytest.raises(ModelSpecError, match=r"lacks lm_head.weight, .*: from_pretrained makes up random values"):
        load_model(f"hf:{tmp_path / 'base'}", weights=True)
    with pytest.raises(MergeError, match=r"layers in it(.|\n)*lm_head.base_layer.weight"):
        lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_directory_that_lacks_a_weight_is_refused_where_transformers_makes_one_up(tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "1.mlp.up" not in k}, path, {"format": "pt"})
    assert LlamaForCausalLM.from_pretrained(tmp_path).model.layers[1].mlp.up_proj.weight.any()
    with pytest.raises(ModelSpecError, match=r"lacks model.layers.1.mlp.up_proj.weight: from_pretrained makes up"):
        load_model(f"hf:{tmp_path}", weights=True)


# -- experts, which transformers holds in banks and keeps one by one on disk


@pytest.mark.parametrize("rslora", [False, True])
def test_experts_that_we_wrote_are_scaled_alike_in_peft_and_transformers(rslora, tmp_path):
    base = built(mixtral)
    ours = in_ours(base, tmp_path, rules("**.experts.*", r=2, alpha=4, rslora=rslora), IDS)
    wanted = computed(ours, IDS)
    assert distance(computed(base, IDS), wanted) > EFFECT
    assert distance(computed(from_file_in_peft(base, tmp_path), IDS), wanted) < OUTPUT
    model = copy.deepcopy(base)
    model.load_adapter(str(tmp_path))
    assert distance(computed(model, IDS), wanted) < OUTPUT


def one_by_one(folder: Path, rslora: bool) -> dict[str, Tensor]:
    """Write an adapter of single experts, as PEFT did with transformers 4, to the folder; return its tensors."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for expert in range(3):
        for name, inner, out in (("w1", 16, 12), ("w2", 12, 16), ("w3", 16, 12)):
            stem = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, inner, generator=generator) * 0.3
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": rslora, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    return tensors


def with_experts(tensors: dict[str, Tensor], scaling: float, gates: float = 1.0) -> nn.Module:
    """Return the base with those deltas in it; those of w1 and w3 times `gates`."""
    model = built(mixtral)
    bank = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for expert in range(3):
            stem = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}"
            w1, w2, w3 = (
                scaling * tensors[f"{stem}.{name}.lora_B.weight"] @ tensors[f"{stem}.{name}.lora_A.weight"]
                for name in ("w1", "w2", "w3")
            )
            bank.gate_up_proj[expert] += gates * torch.cat([w1, w3])
            bank.down_proj[expert] += w2
    return model


def test_experts_of_transformers_4_with_rslora_are_too_strong_in_peft_and_refused_here(tmp_path):
    plain, stable = (one_by_one(tmp_path / str(rslora), rslora) for rslora in (False, True))
    base = built(mixtral)
    right = computed(with_experts(plain, 2.0), IDS)
    assert distance(computed(from_file_in_peft(base, tmp_path / "False"), IDS), right) < OUTPUT
    too_strong = computed(with_experts(stable, 4 / 2**0.5, gates=2**0.5), IDS)
    assert distance(computed(with_experts(stable, 4 / 2**0.5), IDS), too_strong) > EFFECT
    assert distance(computed(from_file_in_peft(base, tmp_path / "True"), IDS), too_strong) < OUTPUT
    for folder in ("False", "True"):
        refused = pytest.raises(AdapterMismatchError, match=r"block_sparse_moe.experts.0.w1 .*has no such linear")
        with pytest.warns(LoraFxWarning, match="w1, w2, w3, which the model lacks"), refused:
            lora_fx.load(base, tmp_path / folder)


def test_checkpoint_of_single_experts_is_merged_where_the_names_are_those_of_the_model(tmp_path):
    base = built(mixtral)
    base.save_pretrained(tmp_path / "base")
    assert any("block_sparse_moe.experts.0.w1" in key for key in load_file(tmp_path / "base" / "model.safetensors"))
    ours = in_ours(base, tmp_path / "q", rules("**.q_proj"), IDS)
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "q", tmp_path / "out")
    read = type(base).from_pretrained(tmp_path / "out").eval()
    assert distance(computed(read, IDS), computed(ours, IDS)) < OUTPUT
    for number, name in enumerate(("**.experts.*", "**.mlp.gate")):
        in_ours(base, tmp_path / str(number), rules(name, r=2), IDS)
        with pytest.raises(AdapterMismatchError, match=r"model.layers.0.mlp.* has no such key"):
            lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / str(number), tmp_path / "other")
