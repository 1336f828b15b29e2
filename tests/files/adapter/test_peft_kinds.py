"""Every kind of weight in files of PEFT's: what PEFT writes computes the same here, what we write the same there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx.errors import AdapterMismatchError, MergeError
from tests.support.kinds import (
    EFFECT,
    OUTPUT,
    Attention,
    Convolutions,
    Matrices,
    Padded,
    Product,
    Tokens,
    built,
    computed,
    distance,
    from_file_in_peft,
    in_ours,
    in_peft,
)
from tests.support.peftkinds import IDS, MIXED, each, gpt2, mixtral
from tests.support.zoo import rules

pytestmark = [pytest.mark.usefixtures("no_graphs"), pytest.mark.filterwarnings("ignore")]


THEIRS = {
    "Conv1D of transformers": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj"]}),
    "Conv1D of transformers, DoRA": (gpt2, {"r": 3, "target_modules": ["c_attn"], "use_dora": True}),
    "Conv1D of transformers, as a parameter": (
        gpt2,
        {"r": 3, "target_modules": [], "target_parameters": ["c_fc.weight"]},
    ),
    "tied head": (gpt2, {"r": 3, "target_modules": ["lm_head", "c_fc"]}),
    "tied embedding": (gpt2, {"r": 3, "target_modules": ["wte"]}),
    "embedding, as a parameter": (gpt2, {"r": 3, "target_modules": [], "target_parameters": ["wpe.weight"]}),
    "Conv1d": (Convolutions, {"r": 3, "target_modules": ["line"]}),
    "Conv2d": (Convolutions, {"r": 3, "target_modules": ["plane"]}),
    "Conv3d": (Convolutions, {"r": 3, "target_modules": ["space"], "use_rslora": True}),
    "all convolutions and a linear": (
        Convolutions,
        {
            "r": 3,
            "target_modules": ["line", "plane", "space", "out"],
            "rank_pattern": {"plane": 2},
            "alpha_pattern": {"line": 5, "out": 2},
        },
    ),
    "embedding": (Tokens, {"r": 3, "target_modules": ["words", "out"], "rank_pattern": {"words": 2}}),
    "x @ w": (Matrices, {"r": 3, "target_modules": [], "target_parameters": ["first.w"]}),
    "one of two parameters": (Matrices, {"r": 3, "target_modules": [], "target_parameters": ["pair.z"]}),
    "the other of two": (Matrices, {"r": 3, "target_modules": [], "target_parameters": ["pair.a"]}),
    "two parameters, rslora": (
        Matrices,
        {"r": 3, "target_modules": [], "target_parameters": ["pair.a", "pair.z"], "use_rslora": True},
    ),
    "one bank": (Matrices, {"r": 3, "target_modules": [], "target_parameters": ["experts.down"]}),
    "two banks": (Matrices, {"r": 3, "target_modules": [], "target_parameters": ["experts.down", "experts.up"]}),
    "bank that is stored [in, out]": (Matrices, {"r": 3, "target_modules": [], "target_parameters": ["stored.bank"]}),
    "parameters with patterns": (
        Matrices,
        {
            "r": 3,
            "target_modules": [],
            "target_parameters": ["w", "z", "a", "up", "down", "bank"],
            "rank_pattern": {"pair.z": 2, "up": 5, "^first.w": 1},
            "alpha_pattern": {"experts.down": 5, "a": 3},
        },
    ),
    "experts of transformers": (
        mixtral,
        {
            "r": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"gate_up_proj": 5},
        },
    ),
    "router": (mixtral, {"r": 3, "target_modules": [], "target_parameters": ["gate.weight"], "lora_alpha": 64}),
    "attention": (Attention, {"r": 3, "target_modules": ["mha"]}),
    "attention with patterns": (
        Attention,
        {"r": 3, "target_modules": ["mha", "out"], "rank_pattern": {"mha": 2}, "alpha_pattern": {"mha": 24}},
    ),
    "projection of attention as a parameter": (
        Attention,
        {"r": 3, "target_modules": [], "target_parameters": ["mha.in_proj_weight"]},
    ),
}


def inputs_of(kind) -> tuple[torch.Tensor, ...]:
    return IDS if kind in (gpt2, mixtral) else kind.inputs


@pytest.mark.parametrize("case", THEIRS)
def test_adapter_that_peft_wrote_computes_the_same_here(case, tmp_path):
    kind, config = THEIRS[case]
    base, inputs = built(kind), inputs_of(kind)
    wanted = computed(in_peft(base, tmp_path, **config), inputs)
    assert distance(computed(base, inputs), wanted) > EFFECT
    samples = [None] if inputs is IDS else [None, lora_fx.call(*inputs)]  # transformers' models bring their own
    for sample in samples:
        ours = lora_fx.load(base, tmp_path, sample)
        assert distance(computed(ours, inputs), wanted) < OUTPUT
        assert distance(computed(lora_fx.merge(ours), inputs), wanted) < OUTPUT


@pytest.mark.parametrize("case", [case for case in THEIRS if THEIRS[case][0] not in (gpt2, mixtral)])
def test_adapter_that_peft_wrote_goes_back_as_it_came(case, tmp_path):
    kind, config = THEIRS[case]
    base, inputs = built(kind), inputs_of(kind)
    wanted = computed(in_peft(base, tmp_path / "theirs", **config), inputs)
    lora_fx.save(lora_fx.load(base, tmp_path / "theirs"), tmp_path / "ours")
    again = lora_fx.load(base, tmp_path / "ours")
    assert distance(computed(again, inputs), wanted) < OUTPUT
    if "attention" not in case or "parameter" in case:  # PEFT has no out_proj of its own
        assert distance(computed(from_file_in_peft(base, tmp_path / "ours"), inputs), wanted) < OUTPUT


OURS = {
    "Conv1D of transformers": (gpt2, rules("**.c_*")),
    "Conv1D of transformers, DoRA": (gpt2, rules("**.c_*", dora=True)),
    "tied head": (gpt2, rules("lm_head")),
    "tied embedding": (gpt2, rules("**.wte")),
    "both ends of a tie": (gpt2, rules(["lm_head", "**.wte"])),
    "Conv1d": (Convolutions, rules("line")),
    "Conv2d": (Convolutions, rules("plane")),
    "Conv3d": (Convolutions, rules("space")),
    "all convolutions and a linear": (Convolutions, {"version": 1, "rules": [each("plane", 3, alpha=2), each("*")]}),
    "embedding": (Tokens, rules("words")),
    "x @ w": (Matrices, rules("first.w")),
    "one of two parameters": (Matrices, rules("pair.z")),
    "two parameters": (Matrices, rules("pair.*")),
    "banks": (Matrices, rules("experts.*")),
    "bank that is stored [in, out]": (Matrices, rules("stored.bank")),
    "parameters with ranks and alphas of their own": (Matrices, MIXED),
    "experts of transformers": (mixtral, rules(["**.q_proj", "**.experts.*"])),
    "router": (mixtral, rules("**.gate")),
    "projection of attention": (Attention, rules("mha.in_proj")),
}


@pytest.mark.parametrize("case", OURS)
@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_adapter_that_we_wrote_computes_the_same_in_peft(case, tmp_path):
    kind, chosen = OURS[case]
    base, inputs = built(kind), inputs_of(kind)
    ours = in_ours(base, tmp_path, chosen, inputs)
    wanted = computed(ours, inputs)
    assert distance(computed(base, inputs), wanted) > EFFECT
    assert distance(computed(from_file_in_peft(base, tmp_path), inputs), wanted) < OUTPUT
    if inputs is not IDS:
        assert torch.equal(computed(lora_fx.load(base, tmp_path), inputs), wanted)
    assert distance(computed(lora_fx.merge(ours), inputs), wanted) < OUTPUT


# -- convolutions in groups


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution_that_we_wrote_computes_the_same_in_peft(groups, tmp_path):
    base = built(Padded, groups=groups, padding=1)
    ours = in_ours(base, tmp_path, rules("conv", r=2), Padded.inputs)
    wanted = computed(ours, Padded.inputs)
    theirs = from_file_in_peft(base, tmp_path)
    assert distance(computed(theirs, Padded.inputs), wanted) < OUTPUT
    with pytest.raises(NotImplementedError, match="groups > 1"):
        theirs.merge_and_unload()
    assert distance(computed(lora_fx.merge(ours), Padded.inputs), wanted) < OUTPUT


def test_grouped_convolution_of_peft_mixes_the_groups_and_is_refused(tmp_path):
    base = built(Padded, groups=2)
    in_peft(base, tmp_path, r=4, target_modules=["conv"])
    (tmp_path / "base").mkdir()
    save_file(dict(base.state_dict()), tmp_path / "base" / "model.safetensors")
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(base, tmp_path)
    problem = (
        "its lora_A reads the channels of all 2 groups of the convolution, whose weight has for each output only those "
        "of one: no weight computes the same; run it in PEFT, or train this layer with lora_fx"
    )
    assert caught.value.mismatches == (("conv", "in the file", problem),)
    with pytest.raises(MergeError) as in_files:
        lora_fx.merge_checkpoint(tmp_path / "base", tmp_path, tmp_path / "merged")
    assert in_files.value.problems == (("conv.weight", problem),)


# -- parts of fused weights, which PEFT has as more ranks with zeros


def sliced(name: str, of: object, adapt: list[str], **lora) -> dict:
    return each(name, **lora) | {"slices": {"of": of, "adapt": adapt}}


class Parts(nn.Module):
    """Weights with parts: of a linear, of a raw matrix that is stored [in, out], and of a bank."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.wide, self.banks = nn.Linear(8, 24), Product(8, 12), Matrices()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        wide = self.wide((q * k).tanh() + v)
        return self.banks(wide[:, :8].tanh()) + wide[:, 4:]

    inputs = (torch.randn(5, 8, generator=torch.Generator().manual_seed(3)),)


SLICED = {
    "linear": [sliced("qkv", ["q", "k", "v"], ["q", "v"])],
    "linear, rslora": [sliced("qkv", ["q", "k", "v"], ["q", "v"], rslora=True)],
    "x @ w": [sliced("wide.w", ["a", "b", "c"], ["c"])],
    "bank": [sliced("banks.experts.up", {"gate": 2, "up": 4}, ["up"])],
    "bank that is stored [in, out]": [sliced("banks.stored.bank", ["gate", "up"], ["up"])],
    "rows in turns": [sliced("qkv", {"even": ["0..4", "8..12"], "odd": ["4..8", "12..24"]}, ["odd"])],
    "all of them": [
        sliced("qkv", ["q", "k", "v"], ["q", "v"], rslora=True),
        sliced("wide.w", ["a", "b", "c"], ["a", "c"], alpha=3),
        sliced("banks.experts.up", {"gate": 2, "up": 4}, ["up"], r=3),
        each("**", 3),
    ],
}


@pytest.mark.parametrize("case", SLICED)
def test_parts_of_a_weight_compute_the_same_in_peft(case, tmp_path):
    base = built(Parts)
    ours = in_ours(base, tmp_path, {"version": 1, "rules": SLICED[case]}, Parts.inputs)
    wanted = computed(ours, Parts.inputs)
    assert distance(computed(base, Parts.inputs), wanted) > EFFECT
    assert distance(computed(from_file_in_peft(base, tmp_path), Parts.inputs), wanted) < OUTPUT
    assert torch.equal(computed(lora_fx.load(base, tmp_path), Parts.inputs), wanted)
    assert distance(computed(lora_fx.merge(ours), Parts.inputs), wanted) < OUTPUT


def test_parts_that_are_not_adapted_stay_as_they_are_in_peft_too(tmp_path):
    base = built(Parts)
    in_ours(base, tmp_path, {"version": 1, "rules": SLICED["linear"]}, Parts.inputs)
    merged = from_file_in_peft(base, tmp_path).merge_and_unload()
    changed = (merged.qkv.weight != base.qkv.weight).any(1)
    assert changed.tolist() == [True] * 8 + [False] * 8 + [True] * 8
