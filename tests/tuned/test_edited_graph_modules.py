"""GraphModules whose graphs somebody edits and compiles again after `apply`: what they say then is computed, adapted."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_fx
from tests.support.zoo import randomise_

RULES = {"rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x).relu())


class Holder(nn.Module):
    """Holds two traced blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(fx.symbolic_trace(Inner()) for _ in range(2))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + x
        return self.out(x)


def node_of_relu(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.target == "relu")


def nothing(graph: fx.Graph) -> None:
    """Compile again what is there."""


def tanh(graph: fx.Graph) -> None:
    node_of_relu(graph).target = "tanh"


def without_relu(graph: fx.Graph) -> None:
    node = node_of_relu(graph)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def doubled(graph: fx.Graph) -> None:
    node = node_of_relu(graph)
    with graph.inserting_after(node):
        twice = graph.call_function(operator.mul, (node, 2.0))
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)


MIDDLE: dict[Callable[[fx.Graph], None], Callable[[Tensor], Tensor]] = {
    nothing: Tensor.relu,
    tanh: Tensor.tanh,
    without_relu: lambda x: x,
    doubled: lambda x: x.relu() * 2.0,
}
EDITS = pytest.mark.parametrize("edit", MIDDLE, ids=lambda edit: edit.__name__)


def edited(tuned: Any, edit: Callable[[fx.Graph], None]) -> None:
    edit(tuned.graph)
    tuned.graph.lint()
    tuned.recompile()


def adapted(model: nn.Module, backend: Any) -> Any:
    tuned = lora_fx.apply(model, RULES, (X,), backend)
    randomise_(tuned)
    return tuned


def trained(output: Tensor, tuned: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(lora_fx.parameters(tuned))))


@EDITS
@pytest.mark.parametrize("backend", ["auto", "modules"])
def test_block_that_is_edited_after_apply_computes_what_its_graph_says(backend, edit):
    torch.manual_seed(0)
    model = Holder()
    expected_base = model(X)
    tuned = adapted(model, backend)
    tuned(X)  # it has run before, as a graph
    edited(tuned.blocks[0], edit)

    def by_hand(of: Any) -> Tensor:
        first, second = of.blocks
        x = first.b(MIDDLE[edit](first.a(X))) + X
        return of.out(second.b(second.a(x).relu()) + x)

    torch.testing.assert_close(tuned(X), by_hand(tuned), rtol=1e-6, atol=1e-6)
    for mine, other in zip(trained(tuned(X), tuned), trained(by_hand(tuned), tuned), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    merged, base = lora_fx.merge(tuned), lora_fx.remove(tuned)
    torch.testing.assert_close(merged(X), tuned(X), rtol=1e-5, atol=1e-6)
    with lora_fx.disabled(tuned):
        assert torch.equal(base(X), tuned(X))
    assert torch.equal(base(X), by_hand(base)), "the edit stays"
    assert torch.equal(model(X), expected_base), "the caller's model has a graph of its own"


@EDITS
def test_adapted_graph_module_that_is_edited_computes_what_its_graph_says(edit):
    torch.manual_seed(0)
    tuned = adapted(fx.symbolic_trace(Inner()), "auto")
    edited(tuned, edit)
    merged, base = lora_fx.merge(tuned), lora_fx.remove(tuned)
    by_hand = merged.b(MIDDLE[edit](merged.a(X)))
    torch.testing.assert_close(merged(X), by_hand, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tuned(X), by_hand, rtol=1e-5, atol=1e-6)
    with lora_fx.disabled(tuned):
        assert torch.equal(base(X), tuned(X))


def test_an_edit_is_seen():
    torch.manual_seed(0)
    tuned = adapted(Holder(), "auto")
    before = tuned(X)
    for edit in (tanh, without_relu, doubled):
        torch.manual_seed(0)
        other = adapted(Holder(), "auto")
        edited(other.blocks[0], edit)
        assert not torch.allclose(other(X), before)
