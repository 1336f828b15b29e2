"""What PEFT does with files otherwise than one would guess: each shown beside what lora_fx does.

A test that shows a client's own behaviour fails where it has been repaired: `docs/clients.md` then says too much.
"""

from __future__ import annotations

import copy
import json
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
from lora_fx.errors import LoraFxWarning
from tests.files.adapter.test_peft_forms import Q, edited, written
from tests.support.around import STRICT_IN_FILES, assert_close, llama, logits
from tests.support.kinds import EFFECT, OUTPUT, built, computed, distance, from_file_in_peft, in_ours, in_peft
from tests.support.zoo import rules

pytestmark = STRICT_IN_FILES


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


class Own(nn.Module):
    """Its own modules bear names of PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.base_layer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gated = nn.ModuleDict({"lora_gate": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.gated["lora_gate"](self.base_layer(self.lin(x).tanh()))


def test_modules_of_ones_own_with_names_of_peft_are_saved_and_merged(tmp_path):
    base = built(Own)
    ours = in_ours(base, tmp_path / "adapter", rules("lin", train=["gated"]), (X,))
    assert torch.equal(lora_fx.load(base, tmp_path / "adapter")(X), ours(X))
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in lora_fx.merge(ours).state_dict().items())


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
