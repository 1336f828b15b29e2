"""Structures of arguments and results: dicts, lists, dataclasses, functions, numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.hazards.base import Hazard, values


class DictOfTensors(Hazard):
    def forward(self, batch):
        y = self.first(batch["x"])
        return y * batch["scale"] if "scale" in batch else y

    def a(self):
        return ({"x": values(2, 5, 8)},), {}

    def b(self):
        return ({"x": values(3, 7, 8), "scale": values(8)},), {}


class DictInAnotherOrder(Hazard):
    def forward(self, batch):
        result = 0
        for index, value in enumerate(batch.values()):
            result = result + self.first(value) * (index + 1)
        return result

    def a(self):
        return ({"x": values(2, 5, 8), "y": values(2, 5, 8, seed=4)},), {}

    def b(self):
        return ({"y": values(2, 5, 8, seed=4), "x": values(2, 5, 8)},), {}


class WritesDictArgument(Hazard):
    def forward(self, batch):
        batch["hidden"] = self.first(batch["x"])
        return self.second(batch["hidden"])

    def a(self):
        return ({"x": values(2, 5, 8)},), {}

    def b(self):
        return ({"x": values(3, 7, 8)},), {}


class ListOfTensors(Hazard):
    def forward(self, parts):
        return torch.cat([self.first(part) for part in parts], 1)

    def a(self):
        return ([values(2, 5, 8), values(2, 3, 8)],), {}

    def b(self):
        return ([values(2, 5, 8), values(2, 3, 8), values(2, 4, 8)],), {}


class AppendsToArgument(Hazard):
    def forward(self, x, collected):
        collected.append(self.first(x))
        return self.second(x)

    def a(self):
        return (values(2, 5, 8), []), {}

    def b(self):
        return (values(3, 7, 8), [1]), {}


class TupleOrList(Hazard):
    def forward(self, pair):
        return self.first(pair[0]) if isinstance(pair, tuple) else self.second(pair[1])

    def a(self):
        return ((values(2, 5, 8), values(2, 5, 8)),), {}

    def b(self):
        return ([values(2, 5, 8), values(2, 5, 8)],), {}


@dataclass
class Batch:
    x: Tensor
    scale: float = 2.0
    mask: Tensor | None = None


class DataclassArgument(Hazard):
    def forward(self, batch):
        y = self.first(batch.x) * batch.scale
        return y if batch.mask is None else y * batch.mask

    def a(self):
        return (Batch(values(2, 5, 8)),), {}

    def b(self):
        return (Batch(values(3, 7, 8), 3.0, values(7, 1)),), {}


class DataclassResult(Hazard):
    def forward(self, x):
        return Batch(self.first(x), float(x.dim()), None)


class WritesDataclass(Hazard):
    def forward(self, batch):
        batch.x = self.first(batch.x)
        return self.second(batch.x)

    def a(self):
        return (Batch(values(2, 5, 8)),), {}

    def b(self):
        return (Batch(values(3, 7, 8)),), {}


class Pair(NamedTuple):
    left: Tensor
    right: Any


class NamedTupleArgument(Hazard):
    def forward(self, pair):
        return Pair(self.first(pair.left), pair.left if pair.right is None else self.second(pair.right))

    def a(self):
        return (Pair(values(2, 5, 8), None),), {}

    def b(self):
        return (Pair(values(3, 7, 8), values(3, 7, 8)),), {}


class NestedArguments(Hazard):
    def forward(self, tree):
        (x, (y, scale)), extra = tree["states"], tree["extra"]
        return {"sum": [self.first(x) + self.second(y) * scale, *extra]}

    def a(self):
        return ({"states": [values(2, 5, 8), (values(2, 5, 8), 2)], "extra": ()},), {}

    def b(self):
        return ({"states": [values(3, 7, 8), (values(3, 7, 8), 3)], "extra": (None, 1)},), {}


class GeneratorArgument(Hazard):
    def forward(self, parts):
        return sum(self.first(part) for part in parts)

    def a(self):
        return ((values(2, 5, 8), values(2, 5, 8, seed=4)),), {}

    def b(self):
        return ((values(2, 5, 8, seed=seed) for seed in range(3)),), {}


class FunctionArgument(Hazard):
    def forward(self, x, finish):
        return finish(self.first(x))

    def a(self):
        return (values(2, 5, 8), torch.tanh), {}

    def b(self):
        return (values(2, 5, 8), torch.sigmoid), {}


class StringArgument(Hazard):
    def forward(self, x, mode="first"):
        return self.first(x) if mode == "first" else self.second(x)

    def b(self):
        return (values(3, 7, 8),), {"mode": "second"}


class NumberArgument(Hazard):
    def forward(self, x, scale, shift=0):
        return self.first(x) * scale + shift

    def a(self):
        return (values(2, 5, 8), 2.0), {"shift": 1}

    def b(self):
        return (values(2, 5, 8), 3.0), {"shift": True}


class StarArguments(Hazard):
    def forward(self, *tensors, **options):
        y = sum(self.first(tensor) for tensor in tensors)
        return y * options.get("scale", 1) + len(options)

    def a(self):
        return (values(2, 5, 8), values(2, 5, 8)), {"scale": 2}

    def b(self):
        return (values(2, 5, 8),), {"shift": 3}


class ByPositionOrName(Hazard):
    def forward(self, x, y):
        return self.first(x) - self.second(y)

    def a(self):
        return (values(2, 5, 8), values(2, 5, 8, seed=9)), {}

    def b(self):
        return (), {"y": values(2, 5, 8), "x": values(2, 5, 8, seed=9)}
