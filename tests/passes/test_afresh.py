"""What is written into a tensor of the graph's own is made anew; what others may see is written as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    "what a dropout in eval mode gives back": lambda x: _after(x, lambda own: F.dropout(own, 0.5, False)),
    "what is contiguous already": lambda x: _after(x, Tensor.contiguous),
    "what a property shows": lambda x: _after(x, lambda own: own.mT.mT),
    "data": lambda x: _after(x, lambda own: own.data),
    "detached": lambda x: _after(x, Tensor.detach),
    "a view by a function that is not listed": lambda x: _after(x, lambda own: torch.einsum("ij->ij", own)),
    "what another function writes to": lambda x: _after(x, lambda own: F.hardtanh(own, 0, 3, True)),
    "other numbers under autocast": lambda x: (x * 2).pow_(2),
}


def _divided(x: Tensor) -> Tensor:
    x /= x.sum(-1, keepdim=True)
    return x * x


def _through_a_view(x: Tensor) -> Tensor:
    shown = x[0]
    x.add_(1)
    return shown + x


def _after(x: Tensor, show: Callable[[Tensor], Tensor]) -> Tensor:
    own = x * 2
    shown = show(own)
    own.add_(1)
    return own * shown


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


def test_what_is_written_without_gradients_is_written_as_before() -> None:
    def forward(x: Tensor) -> Tensor:
        own = x * 2
        with torch.no_grad():
            own.mul_(3)
        return own

    with torch.no_grad():  # which the graph sets too
        assert after(forward)[0]


def test_a_weight_of_another_dtype_is_added_as_the_forward_does() -> None:
    module = Block(lambda self, x: (x * 2).add_(self.first.bias[:1]).mul_(self.row), row=nn.Buffer(torch.ones(1)))
    x = torch.ones(2, 8, dtype=torch.float16)
    with torch.no_grad():
        graph = UncompiledGraph(module, captured(module, x).graph)
        apply_pass(Afresh(), Editor(graph))
        made = compiled(graph.graph, "<test>")(module, x)
        assert made.dtype == torch.float16
        assert torch.equal(made, module(x))
