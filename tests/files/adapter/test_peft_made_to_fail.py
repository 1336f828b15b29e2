"""An adapter that PEFT would get wrong makes it fail and says why; what PEFT writes and no weight can do is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import AdapterMismatchError, RefusedError
from lora_fx.files.adapter.names import CONFIG_FILE
from tests.support.kinds import (
    EFFECT,
    OUTPUT,
    Attention,
    Matrices,
    Padded,
    Product,
    built,
    computed,
    distance,
    from_file_in_peft,
    in_ours,
    in_peft,
)
from tests.support.peftkinds import MIXED, GateReader, Loop, Reader, each, gpt2
from tests.support.zoo import rules

pytestmark = pytest.mark.filterwarnings("ignore")


# -- what PEFT would get wrong makes it fail


class Twice(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b, self.c = self.a, nn.Linear(8, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()).tanh())

    inputs = Loop.inputs


class Twofold(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Encoder(nn.Module):
    """torch's own encoder layer, whose weights a kernel reads in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.layer(x))

    inputs = Attention.inputs


class Own(nn.Module):
    """Has a linear with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.twofold, self.out = Twofold(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.twofold(x).tanh())

    inputs = Loop.inputs


PER_CALL = {"version": 1, "rules": [each("step") | {"per_call": True}, each("out")]}
READ = "code reads its weight, which PEFT would leave as it is"
BORDER = "PEFT would leave out the padding_mode and dilation of the convolution"
ONLY_OURS = {
    "a call's own adapter": (Loop, {}, PER_CALL, "step", "each call has an adapter of its own"),
    "module with two names": (
        Twice,
        {},
        rules("*"),
        "a",
        "the module has several names, of which PEFT would adapt one",
    ),
    "weight that is read": (Reader, {}, rules("*"), "lin", READ),
    "forward of its own": (Own, {}, rules("*"), "twofold", READ),
    "out_proj of attention": (Attention, {}, rules("**"), "mha.out_proj", READ),
    "fused encoder layer": (Encoder, {}, rules("**.linear1"), "layer.linear1", READ),
    "reflected padding": (Padded, {"padding": 1, "padding_mode": "reflect"}, rules("conv"), "conv", BORDER),
    "circular padding": (Padded, {"padding": 1, "padding_mode": "circular"}, rules("conv"), "conv", BORDER),
    "dilation": (Padded, {"padding": "same", "dilation": 2}, rules("conv"), "conv", BORDER),
}


@pytest.mark.parametrize("case", ONLY_OURS)
def test_adapter_that_peft_would_get_wrong_makes_it_fail_and_says_why(case, tmp_path):
    kind, settings, chosen, path, reason = ONLY_OURS[case]
    base = built(kind, **settings)
    wanted = computed(in_ours(base, tmp_path, chosen, kind.inputs), kind.inputs)
    assert distance(computed(base, kind.inputs), wanted) > EFFECT
    with pytest.raises(ValueError, match="not found in the base model") as caught:
        from_file_in_peft(base, tmp_path)
    assert f"only lora_fx can read this adapter, since at {path} {reason}" in str(caught.value)
    assert torch.equal(computed(lora_fx.load(base, tmp_path), kind.inputs), wanted)


@pytest.mark.parametrize("name", ["layer.self_attn.in_proj"])
def test_projection_of_attention_inside_of_an_encoder_layer_makes_peft_fail(name, tmp_path):
    base = built(Encoder)
    wanted = computed(in_ours(base, tmp_path, rules(name), Encoder.inputs), Encoder.inputs)
    with pytest.raises(AttributeError, match="batch_first"):
        computed(from_file_in_peft(base, tmp_path), Encoder.inputs)
    assert torch.equal(computed(lora_fx.load(base, tmp_path), Encoder.inputs), wanted)


def test_raw_parameter_of_the_model_itself_makes_peft_fail(tmp_path):
    base, inputs = built(Product), (torch.randn(3, 8),)
    wanted = computed(in_ours(base, tmp_path, rules("w"), inputs), inputs)
    with pytest.raises(ValueError, match="top-level module is not supported"):
        from_file_in_peft(base, tmp_path)
    assert torch.equal(computed(lora_fx.load(base, tmp_path), inputs), wanted)


def test_raw_parameter_named_weight_that_another_module_reads_makes_peft_fail(tmp_path):
    base = built(GateReader)
    wanted = computed(in_ours(base, tmp_path, rules("gate"), Loop.inputs), Loop.inputs)
    try:
        result = computed(from_file_in_peft(base, tmp_path), Loop.inputs)
    except (ValueError, AttributeError):
        return
    assert distance(result, wanted) < OUTPUT


def test_linear_that_the_examples_do_not_reach_is_written_for_peft(tmp_path):
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, both=False):
            return self.unused(self.used(x)) if both else self.used(x)

    base, inputs = built(Sometimes), Loop.inputs
    ours = in_ours(base, tmp_path, rules("*"), inputs)
    wanted = computed(ours, (*inputs, True))
    assert distance(computed(from_file_in_peft(base, tmp_path), (*inputs, True)), wanted) < OUTPUT
    assert distance(computed(lora_fx.load(base, tmp_path), (*inputs, True)), wanted) < OUTPUT


# -- what PEFT writes and no weight can do


@pytest.mark.parametrize("settings", [{"padding_mode": "reflect"}, {"padding_mode": "circular"}])
def test_adapter_that_peft_trained_without_the_padding_of_its_convolution_is_refused(settings, tmp_path):
    base = built(Padded, padding=1, **settings)
    in_peft(base, tmp_path, r=2, target_modules=["conv"])
    with pytest.raises(RefusedError, match="PEFT trains it without the padding_mode and dilation"):
        lora_fx.load(base, tmp_path)


def test_head_that_peft_saved_with_another_base_weight_is_named(tmp_path):
    in_peft(built(gpt2), tmp_path, r=2, target_modules=["lm_head"])
    torch.manual_seed(9)
    with pytest.raises(AdapterMismatchError, match=r"lm_head\.weight +file trained on other values"):
        lora_fx.load(gpt2(), tmp_path)


def test_configuration_has_pefts_names_for_parameters(tmp_path):
    in_ours(built(Matrices), tmp_path, MIXED, Matrices.inputs)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == [
        "experts.down", "experts.up", "first.w", "pair.a", "pair.z", "stored.bank",
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"]) == (3, 7)
    assert config["rank_pattern"] == {"^experts\\.up": 5, "^pair\\.z": 2}
