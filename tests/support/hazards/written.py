"""What a module holds and its own forward changes: buffers, caches, counters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.support.hazards.base import Hazard


class TableByShape(Hazard):
    """Positions computed once for each length, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {}

    def forward(self, x):
        if x.shape[1] not in self.tables:
            self.tables[x.shape[1]] = torch.arange(x.shape[1]).float().cos()
        return self.first(x) + self.tables[x.shape[1]][None, :, None]


class TableThatGrows(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        if self.table.shape[0] < x.shape[1]:
            self.table = torch.arange(float(x.shape[1]))
        return self.first(x) + self.table[: x.shape[1], None]


class CountsCalls(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.first(x) if self.calls % 2 else self.second(x)


class CountsInDict(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = {"calls": 0}

    def forward(self, x):
        self.statistics["calls"] += 1
        return self.first(x) * self.statistics["calls"]


class KeepsWhatItSaw(Hazard):
    """Appends to a list of its own: no attribute is written."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = self.first(x)
        self.seen.append(y.detach().mean())
        return self.second(y)


class TellsAnObserver(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.observer = SimpleNamespace(largest=0.0)

    def forward(self, x):
        y = self.first(x)
        self.observer.largest = y.detach().amax()
        return y


class CountsOnChild(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()
        self.child.calls = 0

    def forward(self, x):
        self.child.calls += 1
        return self.child(self.first(x)) * self.child.calls


class DeletesAttribute(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.fresh = True

    def forward(self, x):
        if getattr(self, "fresh", False):
            del self.fresh
            return self.first(x)
        return self.second(x)


class LoadsLazily(Hazard):
    def forward(self, x):
        if getattr(self, "scale", None) is None:
            self.scale = torch.full((8,), 1.5)
        return self.first(x) * self.scale


class WritesBuffer(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        self.average.lerp_(x.detach().mean((0, 1)), 0.25)
        return self.first(x - self.average)


class CountsInBuffer(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.steps += 1
        return self.first(x) / self.steps


class WritesBufferByIndex(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(16, 8))

    def forward(self, x):
        self.memory[: x.shape[1]] = x.detach()[0]
        return self.first(x) + self.memory.mean(0)


class ReplacesBuffer(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x):
        y = self.first(x) + self.last
        self.last = x.detach().mean((0, 1))
        return y


class BufferIsReplacedOutside(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        return self.first(x) + self.shift

    def turn(self, to_b):
        self.shift = torch.ones(8, dtype=torch.float64) if to_b else torch.zeros(8)


class RunningStatistics(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.second(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2))


class StatisticsWithoutMomentum(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def forward(self, x):
        return self.norm(self.first(x).flatten(0, 1))


class Spectral(Hazard):
    """A parametrization that writes its own buffers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.third = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x):
        return self.third(self.first(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Parametrized(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(8, 8, bias=False)
        self.third.weight.data.copy_(torch.eye(8))
        parametrize.register_parametrization(self.third, "weight", Doubled())

    def forward(self, x):
        return self.third(self.first(x))
