"""What PEFT and transformers do with files otherwise than one would guess: each shown beside what lora_fx does.

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
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaForCausalLM

import lora_fx
from lora_fx.cli.models.spec import ModelSpecError, load_model
from lora_fx.errors import AdapterMismatchError, LoraFxWarning, MergeError
from tests.files.test_peft_forms import Q, edited, written
from tests.support.around import assert_close, filled, llama, logits
from tests.support.kinds import EFFECT, OUTPUT, built, computed, distance, from_file_in_peft, in_ours, in_peft
from tests.support.peftkinds import IDS, mixtral
from tests.support.zoo import rules

pytestmark = [
    pytest.mark.usefixtures("no_graphs"),
    pytest.mark.filterwarnings(  # PEFT's and transformers' own
        "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning", "error::lora_fx.errors.LoraFxWarning"
    ),
]


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
WORDS = (torch.tensor([[5, 3, 7, 9]]),)


class Chain(nn.Module):
    """Three linears, one of which ends with another's name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.overhead, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.overhead(self.lin(x).tanh()).tanh())


def distilbert() -> nn.Module:
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 50, "max_position_embeddings": 16}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


# -- PEFT


@pytest.mark.parametrize(
    ("kind", "inputs", "sites", "train"),
    [(Chain, (X,), "lin", "head"), (distilbert, WORDS, "**.q_lin", "classifier")],
    ids=["overhead", "pre_classifier"],
)
def test_module_whose_name_ends_like_that_of_one_trained_whole_is_in_the_file(kind, inputs, sites, train, tmp_path):
    """PEFT takes it for trained whole as well, and fails where the file lacks its tensors."""
    base = built(kind)
    ours = in_ours(base, tmp_path, rules(sites, train=[train]), inputs)
    wanted = computed(ours, inputs)
    assert distance(computed(base, inputs), wanted) > EFFECT
    assert distance(computed(from_file_in_peft(base, tmp_path), inputs), wanted) < OUTPUT
    again = lora_fx.load(base, tmp_path)
    assert torch.equal(computed(again, inputs), wanted)
    assert {name for name, p in again.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        f"{train}.weight", f"{train}.bias",
    }  # fmt: skip
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if f"over{train}" not in key}, path)
    if kind is Chain:
        with pytest.raises(KeyError, match="overhead"):
            from_file_in_peft(base, tmp_path)


def test_adapter_of_a_module_whose_name_ends_so_makes_peft_fail(tmp_path):
    base = built(Chain)
    ours = in_ours(base, tmp_path, rules(["lin", "overhead"], train=["head"]), (X,))
    with pytest.raises(ValueError, match="No modules were targeted"):
        from_file_in_peft(base, tmp_path)
    assert torch.equal(lora_fx.load(base, tmp_path)(X), ours(X))
    with pytest.raises(lora_fx.ExportError, match=r"overhead +PEFT would train it whole"):
        lora_fx.export(ours, tmp_path / "x", "peft")


def zero_row() -> nn.Module:
    model = Chain()
    with torch.no_grad():
        model.lin.weight[3] = 0
    return model


def test_row_of_zeros_under_dora_is_nan_in_peft_and_zero_here(tmp_path):
    base = built(zero_row)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lin"], use_dora=True))
    assert computed(theirs, (X,)).isnan().any()
    tuned = lora_fx.apply(base, rules("lin", dora=True), (X,))
    with torch.no_grad():
        tuned.lin.lora_A.default.weight.normal_()
        tuned.lin.lora_B.default.weight.normal_()[3] = 0
    tuned(X).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora_fx.parameters(tuned))
    lora_fx.save(tuned, tmp_path / "adapter")
    with pytest.raises(ValueError, match="a row of its weight is zero"):
        from_file_in_peft(base, tmp_path / "adapter")
    assert torch.equal(computed(lora_fx.load(base, tmp_path / "adapter"), (X,)), computed(tuned, (X,)))
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["lin.weight"]
    assert not merged[3].any()
    torch.testing.assert_close(merged, lora_fx.merge(tuned).lin.weight, rtol=1e-5, atol=1e-6)


def test_half_precision_is_rounded_once_where_peft_with_safe_merge_rounds_twice(tmp_path):
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    in_peft(base, tmp_path, r=4, target_modules=["0"])
    exact = lora_fx.load(base, tmp_path)
    factors = (exact[0].lora_B.default.weight.double(), exact[0].lora_A.default.weight.double())
    once = (base[0].weight.double() + 2.0 * (factors[0] @ factors[1])).half()

    def off(merged: nn.Module) -> int:
        return int((merged[0].weight != once).sum())

    few = 64 * 64 // 200  # a sum in float32 and one in float64 seldom round to two neighbours
    assert off(lora_fx.merge(exact)) <= few
    assert off(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()) <= few
    twice = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload(safe_merge=True)
    assert off(twice) > 10 * few


SETTINGS: dict[str, dict[str, Any]] = {
    "alpha 0": {"target_modules": [*Q, "v_proj"], "alpha_pattern": {"q_proj": 0}},
    "alpha below 0": {"target_modules": [*Q, "v_proj"], "alpha_pattern": {"q_proj": -4}},
    "rslora takes the rank of the pattern": {
        "target_modules": [*Q, "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 5},
    },
    "a pattern means the end of a path": {
        "target_modules": [*Q, "v_proj"], "rank_pattern": {"0.self_attn.q_proj": 4, "v_proj": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_are_read_as_peft_reads_them(settings, tmp_path):
    theirs = written(llama(), tmp_path, **settings)
    assert_close(logits(lora_fx.load(llama(), tmp_path)), logits(theirs))
    llama().save_pretrained(tmp_path / "base")
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path, tmp_path / "out")
    assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(theirs))


def test_configuration_without_alpha_means_8(tmp_path):
    written(llama(), tmp_path, target_modules=Q)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "lora_alpha"}))
    expected = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert expected.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 4.0}
    assert_close(logits(lora_fx.load(llama(), tmp_path)), logits(expected))


def test_pattern_that_fits_no_layer_is_told(tmp_path):
    written(llama(), tmp_path, target_modules=Q)
    edited(tmp_path, rank_pattern={".q_proj": 2}, alpha_pattern={"^q_proj": 3, "q_proj": 4})
    with pytest.warns(LoraFxWarning, match=r"rank_pattern and alpha_pattern name \.q_proj, \^q_proj, which fits no"):
        lora_fx.load(llama(), tmp_path)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_adapters_that_peft_has_put_together_are_read(kind, tmp_path):
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=Q, init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), settings, "one")
    theirs.add_adapter("two", settings)
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.3], kind, combination_type=kind)
    theirs.set_adapter(kind)
    theirs.save_pretrained(tmp_path, selected_adapters=[kind])
    assert_close(logits(lora_fx.load(llama(), tmp_path / kind)), logits(theirs.eval()))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "lm_head"], [*Q, "embed_tokens"]], ids=str)
def test_tied_delta_is_merged_once_where_peft_adds_it_twice(targets, tmp_path):
    theirs = written(llama(tied=True), tmp_path / "adapter", target_modules=targets, ensure_weight_tying=True)
    wanted = logits(theirs)
    assert distance(logits(theirs.merge_and_unload()), wanted) > EFFECT
    base = llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "streamed")
    lora_fx.merge(lora_fx.load(base, tmp_path / "adapter")).save_pretrained(tmp_path / "merged")
    for folder in ("streamed", "merged"):
        read = LlamaForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert distance(logits(read), wanted) < OUTPUT
        read.tie_weights()  # transformers replaces a head of its own by the embedding where the config says tied
        assert distance(logits(read), wanted) < OUTPUT


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
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["lm_head"])
    lora_fx.merge(lora_fx.apply(in_half("lm_head"), Q_ONLY))


def test_streamed_merge_tells_what_config_json_lets_nobody_read(tmp_path):
    in_half("lm_head").save_pretrained(tmp_path / "base")
    chosen = Q_ONLY | {"rules": [{"match": {"name": ["lm_head", "**.q_proj"]}, "lora": {"r": 2}}]}
    lora_fx.save(filled(lora_fx.apply(in_half("lm_head"), chosen)), tmp_path / "both")
    with pytest.warns(LoraFxWarning, match=r"all, bfloat16, .*: lm_head.weight \(float32\)"):
        lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "both", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "both", tmp_path / "half", out_dtype="bfloat16")
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
