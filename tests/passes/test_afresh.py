"""What is written into a tensor of the graph's own is made anew; what others may see is written as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_fx.capture.tracing.writer import writes
from lora_fx.models.code import UncompiledGraph, compiled
from lora_fx.passes.afresh import Afresh
from lora_fx.passes.contract import apply_pass
from lora_fx.passes.editor import Editor
from tests.support.capturing import Block, captured

OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: (x * 2).add_(x),
    "twice": lambda x: (x * 2).add_(x).mul_(3) + 1,
    "used before and after": lambda x: _divided(x.exp()),
    "shown afterwards": lambda x: (x * 2).add_(x).view(-1)[1:] + 1,
    "of the largest": lambda x: _divided(x.topk(2).values),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "an argument": lambda x: x.add_(1),
    "a view of an argument": lambda x: x.view(-1).add_(1),
    "what a view shows": lambda x: _through_a_view(x * 2),
    "of a wider dtype": lambda x: (x * 2).add_(x.double()),
    "perhaps itself": lambda x: x.contiguous().add_(1),
}


def _divided(x: Tensor) -> Tensor:
    x /= x.sum(-1, keepdim=True)
    return x * x


def _through_a_view(x: Tensor) -> Tensor:
    shown = x[0]
    x.add_(1)
    return shown + x


def after(forward: Callable[[Tensor], Tensor]) -> tuple[bool, Tensor, Tensor]:
    """Return whether the graph still writes, and what it gives beside what the forward gives."""
    module = Block(lambda self, x: forward(x))
    x = torch.arange(6.0).view(2, 3) + 1
    graph = UncompiledGraph(module, captured(module, x.clone()).graph)
    apply_pass(Afresh(), Editor(graph))
    function = compiled(graph.graph, "<test>")
    return any(map(writes, graph.graph.nodes)), function(module, x.clone()), forward(x.clone())


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
def test_a_graph_writes_no_more_where_nobody_else_can_see_it(name: str) -> None:
    still_writes, made, expected = after((OWN | OTHERS)[name])
    assert torch.equal(made, expected)
    assert still_writes == (name in OTHERS)
