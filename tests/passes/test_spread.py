"""Graphs send around layers that processes share: once for siblings, and never around what uses such a layer otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lora_fx.capture.captured import NotCaptured
from lora_fx.models.parts import PART, LayerPart, from_parts, into_parts
from lora_fx.passes.contract import apply_pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.spread import Spread, split_layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.norm = nn.Linear(4, 4)
        for layer in (self.q, self.k):
            vars(layer)[PART] = LayerPart(True, None, (), sends=False)
        vars(self.o)[PART] = LayerPart(False, None, (), sends=False)

    def forward(self, x):
        x = self.norm(x)
        return x + self.o(self.q(x) * self.k(x))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x):
        return self.inner(x)


class Reader(Attention):
    def forward(self, x):
        return self.q(x) @ self.k.weight


class Whole(fx.Tracer):
    def is_leaf_module(self, module, name):
        return True


def graph_of(module):
    return fx.GraphModule(module, Whole().trace(module))


def spread(module):
    found = graph_of(module)
    apply_pass(Spread(split_layers(module)), Editor(found))
    found.graph.lint()
    found.recompile()
    return found


def test_siblings_share_what_adds_up_their_gradients_and_a_sum_stands_behind_the_last():
    module, x = Attention(), torch.randn(2, 4)
    found = spread(module)
    targets = [node.target for node in found.graph.nodes if node.op in ("call_module", "call_function")]
    assert targets.count(into_parts) == targets.count(from_parts) == 1
    assert targets.index(into_parts) < targets.index("q") < targets.index("o") < targets.index(from_parts)
    assert torch.equal(found(x), module(x))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Holder(), "inner is called as a whole, and processes share inner."),
        (Reader(), "k.weight is read, and processes share k"),
    ],
)
def test_what_uses_a_split_layer_otherwise_is_no_graph(module, reason):
    with pytest.raises(NotCaptured) as caught:
        spread(module)
    assert str(caught.value).startswith(reason)


def test_a_module_without_split_layers_is_left_as_it_is():
    found = graph_of(nn.Sequential(nn.Linear(4, 4)))
    editor = Editor(found)
    apply_pass(Spread(split_layers(found)), editor)
    assert not editor.journal.modified
