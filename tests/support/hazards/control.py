"""Python that decides something: from values, sizes, types, errors, luck and time."""

from __future__ import annotations

import random
import time

import numpy as np
import torch
from torch import nn

from tests.support.hazards.base import Hazard, values


class BranchOnValue(Hazard):
    def forward(self, x):
        return self.first(x) if x.mean() > 0 else self.second(x)


class BranchOnSize(Hazard):
    def forward(self, x):
        return self.first(x) if x.size(1) < 6 else self.second(x)


class BranchOnRank(Hazard):
    def forward(self, x):
        return self.first(x) if x.dim() == 3 else self.second(x)

    def b(self):
        return (values(4, 8),), {}


class BranchOnTraining(Hazard):
    def forward(self, x):
        return self.first(x) if self.training else self.second(x)


class GivenOrNone(Hazard):
    def forward(self, x, shift=None):
        return self.first(x) if shift is None else self.second(x) + shift

    def b(self):
        return (values(3, 7, 8),), {"shift": values(8)}


class OneOrMany(Hazard):
    def forward(self, x):
        return self.first(x) if isinstance(x, torch.Tensor) else sum(self.second(row) for row in x)

    def b(self):
        return ([values(3, 7, 8), values(3, 7, 8, seed=4)],), {}


class ExactType(Hazard):
    def forward(self, x):
        return self.first(x) if type(x) is torch.Tensor else self.second(x)


class CatchesErrors(Hazard):
    def forward(self, x):
        try:
            return self.first(x) * (1 if bool(x[0, 0, 0] > 0) else 2)
        except Exception:
            return self.second(x)


class LoopOverSteps(Hazard):
    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            state = torch.tanh(self.first(x[:, step]) + self.second(state))
        return state


class LoopOverRows(Hazard):
    def forward(self, x):
        return torch.stack([self.first(row).sum() for row in x])


class LoopUntilSmall(Hazard):
    def forward(self, x):
        y = self.first(x)
        while y.abs().max() > 0.5:
            y = y / 2
        return y


class GeneratorExpression(Hazard):
    def forward(self, x):
        return sum(layer(x) * (index + 1) for index, layer in enumerate((self.first, self.second)))


class SizeAsInt(Hazard):
    def forward(self, x):
        return self.first(x) * int(x.shape[0])


class SizeAsFloat(Hazard):
    def forward(self, x):
        return self.first(x) * float(x.shape[1]) ** -0.5


class SizeAsBool(Hazard):
    def forward(self, x):
        return self.first(x) if bool(x.shape[0] % 2) else self.second(x)


class SizeAsText(Hazard):
    def forward(self, x):
        return self.first(x) * len(str(10 ** int(x.shape[1])))


class SizeAsTensor(Hazard):
    def forward(self, x):
        return self.first(x) * torch.tensor([x.shape[1], x.shape[0]]).float().mean()


class SizeArithmetic(Hazard):
    def forward(self, x):
        half = (x.shape[1] + 1) // 2
        return torch.cat([self.first(x[:, :half]), self.second(x[:, half:])], 1) * (1 / max(half, 3))


class TensorAsInt(Hazard):
    def forward(self, x):
        return self.first(x)[:, int(x[0, :, 0].argmax()) :]


class TensorAsFloat(Hazard):
    def forward(self, x):
        return self.first(x) * float(x.max())


class TensorAsBool(Hazard):
    def forward(self, x):
        return self.first(x) if bool((x > 0.9).any()) else self.second(x)


class ReadsItem(Hazard):
    def forward(self, x):
        return self.first(x) - x.sum().item()


class ReadsList(Hazard):
    def forward(self, x):
        return self.first(x) * sum(x[0, 0].tolist())


class ReadsNumpy(Hazard):
    def forward(self, x):
        return self.first(x) * float(x.detach().numpy().mean())


class PicksByMask(Hazard):
    def forward(self, x):
        y = self.second(x)
        y[x[..., 0] > 0] = 0
        return y


class PicksByNonzero(Hazard):
    def forward(self, x):
        rows = (x.sum(-1) > 0).nonzero()
        return self.first(x[rows[:, 0], rows[:, 1]])


class PythonLuck(Hazard):
    def forward(self, x):
        return (self.first if random.randint(0, 1) else self.second)(x)


class PythonShuffle(Hazard):
    def forward(self, x):
        layers = [self.first, self.second]
        random.shuffle(layers)
        return layers[1](torch.tanh(layers[0](x)))


class NumpyLuck(Hazard):
    def forward(self, x):
        return self.first(x) * float(np.random.rand())


class NumpyGenerator(Hazard):
    """A generator of its own, held by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.luck = np.random.default_rng(0)

    def forward(self, x):
        return self.first(x) * float(self.luck.random())


class PythonGenerator(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.luck = random.Random(0)

    def forward(self, x):
        return self.first(x) * self.luck.random()


class TorchCoin(Hazard):
    def forward(self, x):
        return x + self.first(x) if torch.rand(()) < 0.5 else x


class TorchNoise(Hazard):
    def forward(self, x):
        return self.first(x) + torch.randn_like(x) * torch.rand(x.shape[0], 1, 1)


class TorchGenerator(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.luck = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.first(x) + torch.rand(x.shape, generator=self.luck)


class SeedsItself(Hazard):
    def forward(self, x):
        torch.manual_seed(3)
        return self.first(x) + torch.rand_like(x)


_TIME = time.time


class ReadsClock(Hazard):
    def forward(self, x):
        return self.first(x) if time.time() > 100.0 else self.second(x)

    def turn(self, to_b):
        time.time = (lambda: 0.0) if to_b else _TIME


class BranchOnDtype(Hazard):
    def forward(self, x):
        return self.first(x) if x.dtype == torch.float32 else self.second(x.float()).to(x.dtype)

    def b(self):
        return (values(3, 7, 8).double(),), {}


class BranchOnDevice(Hazard):
    def forward(self, x):
        return self.first(x) if x.device.type == "cpu" and x.is_cpu else self.second(x)


class BranchOnStride(Hazard):
    def forward(self, x):
        return self.first(x) if x.stride(0) > x.stride(1) else self.second(x)

    def b(self):
        return (values(7, 3, 8).transpose(0, 1),), {}


class BranchOnContiguity(Hazard):
    def forward(self, x):
        return self.first(x) if x.is_contiguous() else self.second(x)

    def b(self):
        return (values(3, 7, 16)[..., ::2],), {}


class BranchOnIdentity(Hazard):
    def forward(self, x, y):
        return self.first(x) if x is y else self.second(x) + y

    def a(self):
        x = values(2, 5, 8)
        return (x, x), {}

    def b(self):
        return (values(2, 5, 8), values(2, 5, 8)), {}


class BranchOnParameter(Hazard):
    """A learnt gate that is read as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.first(x) if self.gate > 0 else self.second(x)

    def turn(self, to_b):
        self.gate.data.fill_(-0.5 if to_b else 0.5)
