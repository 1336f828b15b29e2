"""A module with any forward, its graph, and why a call does not fit one."""

from __future__ import annotations

import enum

import pytest
import torch
from torch import nn

from lora_fx.capture.captured import Captured, NotCaptured, capture
from lora_fx.capture.guards import compile_guard
from lora_fx.regions.program import make_program
from tests.support import zoo


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Block(nn.Module):
    """A module whose forward is given as a function of (self, *inputs)."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = forward

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


def x(batch: int = 2, length: int = 5) -> torch.Tensor:
    return zoo.features(batch, length, 8)


def captured(module: nn.Module, *args, **kwargs) -> Captured:
    with torch.no_grad():
        return capture(module, args, kwargs)


def refusal(forward, *args, **parts) -> str:
    with pytest.raises(NotCaptured) as caught:
        captured(Block(forward, **parts), *(args or (x(),)))
    return str(caught.value)


def agrees(module: nn.Module, *calls: tuple) -> None:
    """The graph captured from the first call fits all calls and computes what the module computes."""
    program = make_program(captured(module, *calls[0]), module)
    with torch.no_grad():
        for args in calls:
            inputs = program.guard.match(module, args, {})
            assert isinstance(inputs, tuple), program.guard.reasons[inputs]
            result, expected = program.function(module, *inputs), module(*args)
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


def reason(module: nn.Module, graph: Captured, *args, **kwargs) -> str | None:
    guard = compile_guard(graph, {path: type(module.get_submodule(path)) for path in graph.dependencies.inlined})
    result = guard.match(module, args, kwargs)
    return guard.reasons[result] if isinstance(result, int) else None


def told_after(module: nn.Module, change) -> str | None:
    """Return why a graph of the module does not fit any more after a change; before it, it fits."""
    graph = captured(module, x())
    with torch.no_grad():
        assert reason(module, graph, x()) is None
        change()
        return reason(module, graph, x())


def put(module: object, name: str, value: object):
    return lambda: setattr(module, name, value)
