"""Names in PEFT's files where a layer, a raw parameter of it and a graph could be mistaken for each other."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn

import lora_fx
from lora_fx.files.adapter.names import WEIGHTS_FILE
from tests.support.kinds import (
    EFFECT,
    OUTPUT,
    Convolutions,
    Matrices,
    Tokens,
    built,
    computed,
    distance,
    from_file_in_peft,
    in_ours,
    in_peft,
)
from tests.support.peftkinds import GateReader, Loop, Reader
from tests.support.zoo import randomise_, rules

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_linear_with_embedding_in_its_name_is_no_embedding(tmp_path):
    """As `time_embedding.linear_1` of diffusers."""
    base = built(lambda: nn.Sequential(OrderedDict(time_embedding=nn.Linear(8, 8), lora_embedding_A=nn.Linear(8, 8))))
    ours = in_ours(base, tmp_path, rules("*"), Loop.inputs)
    wanted = computed(ours, Loop.inputs)
    assert torch.equal(computed(lora_fx.load(base, tmp_path), Loop.inputs), wanted)
    assert distance(computed(from_file_in_peft(base, tmp_path), Loop.inputs), wanted) < OUTPUT


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


@pytest.mark.parametrize("kind", [Reader, GateReader])
def test_twin_inside_of_another_module_is_saved_with_what_is_known_of_it(kind, tmp_path):
    """As a LightningModule holds it: the names of all weights have a prefix that they had not when it was made."""
    base = built(kind)
    ours = lora_fx.apply(base, rules("{lin,gate,out}"), lora_fx.call(*kind.inputs))
    randomise_(ours)
    lora_fx.save(nn.Sequential(ours), tmp_path)
    loaded = lora_fx.load(nn.Sequential(base), tmp_path)
    assert distance(computed(loaded, kind.inputs), computed(ours, kind.inputs)) < OUTPUT
    with pytest.raises(ValueError, match="only lora_fx can read this adapter"):
        from_file_in_peft(nn.Sequential(base), tmp_path)
