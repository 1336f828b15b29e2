"""Every kind of weight in files of PEFT's: what PEFT writes computes the same here, what we write the same there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import lora_fx
from lora_fx.errors import AdapterMismatchError, RefusedError
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
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
from tests.support.zoo import randomise_, rules

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = (torch.tensor([[1, 5, 7, 9], [3, 4, 2, 8]]),)


def gpt2() -> nn.Module:
    """Linears of class Conv1D, which store [in, out]; the head is tied to the embedding."""
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16, **special))


def mixtral() -> nn.Module:
    """Banks of experts, and a router that is a raw parameter."""
    sizes = {"hidden_size": 16, "intermediate_size": 12, "vocab_size": 50, "num_local_experts": 3}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


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


def each(name: str, r: int = 2, **lora) -> dict:
    return {"match": {"name": name}, "lora": {"r": r, **lora}}


MIXED = {
    "version": 1,
    "rules": [each("pair.z"), each("experts.up", 5, alpha=3), each("first.w", 3, rslora=True), each("**", 3, alpha=7)],
}


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
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(base, tmp_path)
    problem = "its lora_A mixes the groups of the convolution, which no merged weight can do"
    assert caught.value.mismatches == (("conv", "in the file", problem),)


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


# -- what PEFT would get wrong makes it fail


class Loop(nn.Module):
    """One linear that is called three times, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(3):
            x = self.step(x).tanh()
        return self.out(x)

    inputs = (torch.randn(5, 8, generator=torch.Generator().manual_seed(3)),)


class Twice(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b, self.c = self.a, nn.Linear(8, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()).tanh())

    inputs = Loop.inputs


class Reader(nn.Module):
    """Reads the weight of a linear that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.lin.weight).tanh())

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


class Gate(nn.Module):
    """A weight that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


class GateReader(nn.Module):
    """Reads the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = Gate(), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.gate.weight).tanh())

    inputs = Loop.inputs


def test_raw_parameter_named_weight_that_another_module_reads_makes_peft_fail(tmp_path):
    base = built(GateReader)
    wanted = computed(in_ours(base, tmp_path, rules("gate"), Loop.inputs), Loop.inputs)
    try:
        found = computed(from_file_in_peft(base, tmp_path), Loop.inputs)
    except (ValueError, AttributeError):
        return
    assert distance(found, wanted) < OUTPUT


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


@pytest.mark.parametrize(("kind", "name"), [(Tokens, "words"), (Convolutions, "plane")])
def test_dora_of_what_is_no_linear_is_refused(kind, name, tmp_path):
    base = built(kind)
    in_peft(base, tmp_path, r=2, target_modules=[name], use_dora=True)
    with pytest.raises(RefusedError, match=rf"{name} +DoRA is for whole linear layers, not for this kind of site"):
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


# -- names


class Both(nn.Module):
    """A linear, with a raw parameter on the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.lin.extra = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x):
        return self.lin(x).tanh() @ self.lin.extra

    inputs = Loop.inputs


def test_layer_and_a_raw_parameter_of_it_have_keys_of_their_own(tmp_path):
    base = built(Both)
    wanted = computed(in_ours(base, tmp_path, rules(["lin", "lin.extra"]), Both.inputs), Both.inputs)
    assert sorted(load_file(tmp_path / WEIGHTS_FILE)) == [
        f"base_model.model.lin{inner}.lora_{factor}.weight" for inner in (".base_layer", "") for factor in "AB"
    ]
    assert torch.equal(computed(lora_fx.load(base, tmp_path, lora_fx.call(*Both.inputs)), Both.inputs), wanted)
    with pytest.raises(ValueError, match="only lora_fx can read this adapter"):
        from_file_in_peft(base, tmp_path)


def test_layer_and_a_raw_parameter_of_it_are_loaded_without_inputs(tmp_path):
    base = built(Both)
    wanted = computed(in_ours(base, tmp_path, rules(["lin", "lin.extra"]), Both.inputs), Both.inputs)
    assert torch.equal(computed(lora_fx.load(base, tmp_path), Both.inputs), wanted)


class Named(nn.Module):
    """Modules that bear the names that PEFT gives its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Module()
        self.enc.base_layer = nn.Module()
        self.enc.base_layer.fc, self.enc.base_layer.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.enc.base_layer.out_proj(self.enc.base_layer.fc(x).tanh())

    inputs = Loop.inputs


def test_module_that_bears_a_name_of_pefts_own_is_no_attention(tmp_path):
    base = built(Named)
    theirs = in_peft(base, tmp_path, r=3, target_modules=["fc", "out_proj"], alpha_pattern={"fc": 3})
    wanted = computed(theirs, Named.inputs)
    assert distance(computed(lora_fx.load(base, tmp_path), Named.inputs), wanted) < OUTPUT


@pytest.mark.parametrize("kind", [Matrices, Convolutions, Tokens])
def test_file_of_a_graph_is_that_of_its_model_and_the_other_way(kind, tmp_path):
    base = built(kind)
    graph, chosen = fx.symbolic_trace(base), rules("**" if kind is Matrices else "*")
    of_model = computed(in_ours(base, tmp_path / "model", chosen, kind.inputs), kind.inputs)
    of_graph = computed(in_ours(graph, tmp_path / "graph", chosen, kind.inputs), kind.inputs)
    assert distance(computed(base, kind.inputs), of_graph) > EFFECT
    assert distance(computed(lora_fx.load(graph, tmp_path / "model"), kind.inputs), of_model) < OUTPUT
    assert distance(computed(lora_fx.load(base, tmp_path / "graph"), kind.inputs), of_graph) < OUTPUT
    assert distance(computed(from_file_in_peft(base, tmp_path / "graph"), kind.inputs), of_graph) < OUTPUT


@pytest.mark.parametrize("backend", ["graph", "modules"])
@pytest.mark.parametrize("kind", [Reader, GateReader])
def test_weight_that_a_graph_reads_is_read_in_the_model_of_its_file_too(kind, backend, tmp_path):
    base = built(kind)
    graph = fx.symbolic_trace(base)
    ours = lora_fx.apply(graph, rules("{lin,gate}"), backend=backend)
    randomise_(ours)
    wanted = computed(ours, kind.inputs)
    assert distance(computed(base, kind.inputs), wanted) > EFFECT
    assert distance(computed(lora_fx.merge(ours), kind.inputs), wanted) < OUTPUT
    lora_fx.save(ours, tmp_path)
    for model in (base, graph):
        assert distance(computed(lora_fx.load(model, tmp_path), kind.inputs), wanted) < OUTPUT
    with pytest.raises(ValueError, match="only lora_fx can read this adapter"):
        from_file_in_peft(base, tmp_path)
