"""The judge itself: it passes what is right, and finds each way of being wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lora_fx.regions.install import regions
from tests.support.hazards.base import Hazard
from tests.support.judging import INFERENCE, INSIDE, TRAINING, Step, Trial, judge


class Honest(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.note = "as made"

    def forward(self, x):
        self.average.lerp_(x.detach().mean((0, 1)), 0.25)
        return torch.tanh(self.first(x)) * self.second(x)


def trial(**more) -> Trial:
    probe = Honest()
    steps = [
        Step(name, getattr(probe, name), mode) for mode in (INFERENCE, TRAINING, INSIDE) for name in ("a", "b", "a")
    ]
    return Trial(Honest, lambda: [probe.a()], steps, **more)


def instead_of_every_graph(wrong):
    """Return a sabotage: `wrong(right, module, x)` runs in place of each graph that the model has captured."""

    def sabotage(model: nn.Module) -> None:
        for _, _, region in regions(model):
            for program in region.block.programs:
                right = program.function
                program.function = lambda module, *inputs, right=right: wrong(right, module, *inputs)

    return sabotage


def one_bit(right, module, x):
    return torch.nextafter(right(module, x), torch.tensor(torch.inf))


def another_dtype(right, module, x):
    return right(module, x).double()


def another_layout(right, module, x):
    return right(module, x).transpose(0, 1).contiguous().transpose(0, 1)


def a_tuple(right, module, x):
    return (right(module, x),)


def no_gradient(right, module, x):
    return right(module, x.detach())


def gradient_doubled(right, module, x):
    result = right(module, x)
    return result + (result - result.detach())


def stale_buffer(right, module, x):
    kept = module.average.clone()
    result = right(module, x)
    module.average.copy_(kept)
    return result


def writes_the_argument(right, module, x):
    result = right(module, x)
    with torch.no_grad():
        x[0, 0, 0] = 9
    return result


def writes_an_attribute(right, module, x):
    module.note = "written"
    return right(module, x)


def writes_a_parameter(right, module, x):
    result = right(module, x)
    module.second.bias.data.add_(1e-3)
    return result


def draws_from_torch(right, module, x):
    torch.rand(1)
    return right(module, x)


def draws_from_python(right, module, x):
    random.random()
    return right(module, x)


def draws_from_numpy(right, module, x):
    np.random.rand()
    return right(module, x)


def returns_the_argument(right, module, x):
    return x.copy_(right(module, x).detach())


def raises(right, module, x):
    raise ValueError("no such graph")


def without_adapter(right, module, x):
    result = right(module, x)
    with torch.no_grad():
        base = torch.tanh(nn.functional.linear(x, module.first.get_parameter("weight"), module.first.bias))
        base = base * nn.functional.linear(x, module.second.get_parameter("weight"), module.second.bias)
    return result + (base - result).detach()


def test_honest_graph_is_found_right():
    verdict = judge(trial())
    assert verdict.silent is None
    assert verdict.outcome == "graph"
    assert (verdict.hits, verdict.calls) == (3, 3)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (one_bit, "result: off by"),
        (another_dtype, "result: [2, 5, 8] torch.float64"),
        (another_layout, "result.stride"),
        (a_tuple, "result: Thing"),
        (no_gradient, "gradient of"),
        (gradient_doubled, "gradient of argument"),
        (stale_buffer, "state"),
        (writes_the_argument, "argument"),
        (writes_an_attribute, "state"),
        (writes_a_parameter, "result: off by"),
        (draws_from_torch, "random state"),
        (draws_from_python, "random state"),
        (draws_from_numpy, "random state"),
        (returns_the_argument, "result.is_argument"),
        (raises, "result: ValueError"),
        (without_adapter, "graph beside modules"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_graph_is_found_and_placed(wrong, where):
    verdict = judge(trial(sabotage=instead_of_every_graph(wrong)))
    assert verdict.silent is not None
    assert where in verdict.silent
    assert verdict.outcome.startswith("SILENT")


def test_graph_that_is_never_run_does_not_count_as_one():
    def disable(model: nn.Module) -> None:
        for _, _, region in regions(model):
            region.enabled = False

    verdict = judge(trial(sabotage=disable))
    assert verdict.silent is None
    assert verdict.hits == 0
    assert verdict.outcome != "graph"
