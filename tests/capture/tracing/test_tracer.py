"""The tracer: what goes into a graph, what is refused with which reason, and that nothing is left behind."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.capture.captured import NotCaptured, capture
from lora_fx.regions.program import make_program
from tests.support import zoo
from tests.support.capturing import Block, agrees, captured, refusal, x


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.first(x),
        lambda self, x: F.linear(x, self.first.weight) @ self.second.weight,
        lambda self, x: self.first(x).view(*x.shape[:-1], 2, -1).transpose(1, 2).reshape(x.shape),
        lambda self, x: 2 ** self.first(x) - 3 / self.second(x).exp(),
        lambda self, x: torch.cat([part.exp() for part in self.first(x).chunk(2, -1)], -1),
        lambda self, x: sum(row for row in self.first(x).unbind(-1)),
        lambda self, x: torch.stack([a + b for a, b in zip(x.unbind(-1), x.unbind(-1))]),
        lambda self, x: (self.first(x), [self.second(x), None, 3], {"key": x}),
        lambda self, x: x * x.shape[0] * (x.shape[1] ** -0.5),
        lambda self, x: x + torch.arange(x.shape[1], device=x.device)[None, :, None],
        lambda self, x: x.new_zeros(x.shape[0], 1).expand(-1, x.shape[1]) + x[..., 0],
        lambda self, x: torch.where(x > 0, self.first(x), x[:, -1:]),
        lambda self, x: self.first(x) if isinstance(x, torch.Tensor) else None,
        lambda self, x: x.mT.mT.sum() + x.real.mean(),
        lambda self, x: x[..., :4].clone().mul_(2),
    ],
    ids=range(15),
)
def test_graph_computes_what_the_forward_computes_at_other_sizes(forward):
    agrees(Block(forward), (x(2, 5),), (x(3, 7),), (x(9, 5),))


def test_named_tuples_and_model_outputs_come_back_as_they_are():
    from collections import namedtuple

    Pair = namedtuple("Pair", "left right")
    module = Block(lambda self, x: Pair(self.first(x), x))
    program = make_program(captured(module, x()), module)
    result = program.function(module, x(3, 4))
    assert type(result).__name__ == "Pair"
    assert torch.equal(result.left, module(x(3, 4)).left)


def test_no_grad_inside_stays():
    def forward(self, x):
        with torch.no_grad():
            y = self.second(x)
        return self.first(x) + y

    module = Block(forward)
    program = make_program(capture(module, (x(),), {}), module)
    program.function(module, x()).sum().backward()
    assert module.first.weight.grad is not None
    assert module.second.weight.grad is None


def test_autocast_inside_stays():
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.first(x)

    module = Block(forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = make_program(capture(module, (x(),), {}), module)
        assert program.function(module, x()).dtype == torch.float32
        assert module(x()).dtype == torch.float32


def test_custom_backward_stays():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    module = Block(lambda self, x: Reverse.apply(self.first(x)))
    program = make_program(capture(module, (x(),), {}), module)
    program.function(module, x()).sum().backward()
    reversed_gradient = module.first.weight.grad.clone()
    module.zero_grad()
    module(x()).sum().backward()
    assert torch.equal(reversed_gradient, module.first.weight.grad)


def test_buffer_written_in_place_is_written_by_the_graph_and_not_by_the_capture():
    def forward(self, x):
        self.ema.mul_(0.5).add_(x.mean())
        return self.first(x) + self.ema

    module = Block(forward)
    module.register_buffer("ema", torch.zeros(()))
    graph = captured(module, x())
    assert module.ema == 0
    program = make_program(graph, module)
    program.function(module, x())
    torch.testing.assert_close(module.ema, x().mean())


def test_batch_norm_does_not_count_the_capture():
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    capture(module, (torch.randn(4, 8),), {})
    assert module[1].num_batches_tracked == 0
    assert torch.equal(module[1].running_mean, torch.zeros(8))


# -- refused, with the reason


def counts_calls(self, x):
    self.calls = 1
    return self.first(x)


def swallows(self, x):
    try:
        return self.first(x) if bool(x.sum() > 0) else x
    except Exception:
        return self.second(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (counts_calls, "the forward writes calls to the module"),
        (lambda self, x: self.first(x) * random.random(), "the forward draws from Python's random"),
        (lambda self, x: self.first(x) if x.sum() > 0 else x, "Could not guard on data-dependent expression"),
        (lambda self, x: self.first(x) * x.sum().item(), "the forward asks a tensor for item()"),
        (swallows, "Could not guard on data-dependent expression"),
        (lambda self, x: self.first(x) if x.data_ptr() else x, "data_ptr"),
        (
            lambda self, x: self.first(x) if self.first(x).requires_grad else x,
            "the forward asks a tensor for requires_grad",
        ),
        (lambda self, x: self.first(x) + OUTSIDE, "a tensor is neither an argument nor a parameter"),
        (lambda self, x: object(), "the forward returns an object of type object"),
        (lambda self, x: torch.func.vmap(self.first)(x), "functorch"),
    ],
    ids=["state", "random", "value", "item", "swallowed", "pointer", "requires_grad", "outside", "object", "vmap"],
)
def test_what_may_come_out_differently_is_refused_with_the_reason(forward, reason):
    assert reason in refusal(forward)


OUTSIDE = torch.ones(8)


class Counted:
    """A plain object of which a module holds several."""

    def __init__(self) -> None:
        self.calls = 0


@pytest.mark.parametrize("which", range(4))
def test_write_to_any_object_in_a_list_of_the_module_is_refused(which):
    def forward(self, a):
        self.counters[which].calls += 1
        return self.first(a)

    assert refusal(forward, counters=[Counted() for _ in range(4)]) == "the forward writes counters to the module"


def test_opaque_argument_is_refused_by_name():
    module = Block(lambda self, x, cache: self.first(x))
    with pytest.raises(NotCaptured, match="argument cache is of type Mlp"):
        capture(Named(module), (x(), zoo.Mlp()), {})


class Named(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, cache=None):
        return self.inner(x, cache)


def test_child_that_cannot_be_captured_stays_one_call_and_says_why():
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.counter = nn.Linear(8, 8), Block(counts_calls)

        def forward(self, x):
            return self.counter(self.fc(x))

    module = Parent()
    graph = captured(module, x())
    assert graph.dependencies.retreats == {"counter": "the forward writes counter.calls to the module"}
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["fc", "counter"]
    assert "calls" not in vars(module.counter)


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.stack([self.fc(x[:, index]) for index in range(x.shape[1])], 1)


def test_size_that_the_forward_bakes_in_is_guarded_and_refused_where_it_is_known_to_vary():
    module = Looping()
    assert "s0_1 == 5" in captured(module, x(2, 5)).size_guards
    with torch.no_grad(), pytest.raises(NotCaptured, match="turns a varying size into a constant"):
        capture(module, (x(2, 5),), {}, varying=frozenset({(0, 1)}))
