"""Unusual tensors: subclasses, dtypes, strides, empty, shared; writes to arguments; what is given back."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.hazards.base import Hazard, values


class Tagged(Tensor):
    pass


class SubclassInput(Hazard):
    def forward(self, x):
        return self.first(x) if type(x) is Tensor else self.second(x)

    def b(self):
        return (values(3, 7, 8).as_subclass(Tagged),), {}


class ComplexInput(Hazard):
    def forward(self, x):
        return self.first(x.real) + (self.second(x.imag) if x.is_complex() else 0)

    def a(self):
        return (torch.complex(values(2, 5, 8), values(2, 5, 8, seed=4)),), {}

    def b(self):
        return (torch.complex(values(3, 7, 8), values(3, 7, 8, seed=4)).conj(),), {}


class IntegerInput(Hazard):
    def forward(self, x):
        return self.first(x.float()) if x.dtype == torch.int64 else self.second(x.float() * 2)

    def a(self):
        return (torch.arange(80).view(2, 5, 8),), {}

    def b(self):
        return (torch.arange(80, dtype=torch.int32).view(2, 5, 8),), {}


class BooleanInput(Hazard):
    def forward(self, x, keep):
        return self.first(x).masked_fill(keep, 0) if keep.dtype == torch.bool else self.second(x) * keep

    def a(self):
        return (values(2, 5, 8), torch.arange(5)[:, None] > 2), {}

    def b(self):
        return (values(3, 7, 8), torch.arange(7.0)[:, None]), {}


class ScalarTensorInput(Hazard):
    def forward(self, x, scale):
        return self.first(x) * scale

    def a(self):
        return (values(2, 5, 8), torch.tensor(2.0)), {}

    def b(self):
        return (values(2, 5, 8), torch.tensor(3.0, dtype=torch.float64)), {}


class NoSteps(Hazard):
    def forward(self, x):
        return self.first(x).sum(1) / (x.shape[1] + 1)

    def b(self):
        return (values(2, 0, 8),), {}


class NoBatch(Hazard):
    def forward(self, x):
        return self.first(x) if x.shape[0] else self.second(x)

    def b(self):
        return (values(0, 5, 8),), {}


class OneOfEach(Hazard):
    """A size of 1 broadcasts."""

    def forward(self, x, y):
        return self.first(x) + self.second(y) * (2 if x.shape[1] == y.shape[1] else 3)

    def a(self):
        return (values(2, 5, 8), values(2, 5, 8)), {}

    def b(self):
        return (values(2, 5, 8), values(2, 1, 8)), {}


class Squeezes(Hazard):
    def forward(self, x):
        return self.first(x).squeeze()

    def b(self):
        return (values(1, 7, 8),), {}


class SameTensorTwice(Hazard):
    def forward(self, x, y):
        x.add_(1)
        return self.first(x) + self.second(y)

    def a(self):
        return (values(2, 5, 8), values(2, 5, 8)), {}

    def b(self):
        x = values(2, 5, 8)
        return (x, x), {}


class OverlappingViews(Hazard):
    """Two arguments on the same memory: a write to one is seen in the other."""

    def forward(self, x, y):
        x.mul_(2)
        return self.first(x) + self.second(y)

    def a(self):
        return (values(2, 5, 8), values(2, 5, 8)), {}

    def b(self):
        both = values(2, 6, 8)
        return (both[:, :5], both[:, 1:]), {}


class ExpandedInput(Hazard):
    def forward(self, x):
        return self.first(x) + x.contiguous().view(-1, 8).mean()

    def b(self):
        return (values(1, 7, 8).expand(3, 7, 8),), {}


class StridedInput(Hazard):
    def forward(self, x):
        return self.first(x).flatten() + x.reshape(-1)

    def b(self):
        return (values(7, 3, 8).transpose(0, 1),), {}


class ChannelsLast(Hazard):
    def forward(self, x):
        return self.first(x) + torch.empty_like(x).fill_(1)

    def a(self):
        return (values(2, 5, 8, 8),), {}

    def b(self):
        return (values(2, 5, 8, 8).contiguous(memory_format=torch.channels_last),), {}


class WritesArgument(Hazard):
    def forward(self, x):
        x.mul_(0.5)
        return self.first(x)


class WritesArgumentByIndex(Hazard):
    def forward(self, x):
        x[:, 0] = 0
        x[..., -1] += 1
        return self.first(x)


class WritesViewOfIntermediate(Hazard):
    def forward(self, x):
        y = self.first(x)
        y[..., :4].mul_(2)
        y.view(-1)[:3].zero_()
        y.transpose(0, 1)[0] += 1
        return self.second(y)


class WritesThroughOut(Hazard):
    def forward(self, x):
        result = torch.empty(x.shape)
        torch.mul(x, 2, out=result)
        return self.first(result)


class SetsData(Hazard):
    def forward(self, x):
        y = x.clone()
        y.data = x.data * 2
        return self.first(y)


class ReadsData(Hazard):
    def forward(self, x):
        return self.first(x) + x.data


class ReturnsArgument(Hazard):
    def forward(self, x, y):
        return self.first(x), y, x[0], y.view(-1)

    def a(self):
        return (values(2, 5, 8), values(2, 5, 8)), {}

    def b(self):
        return (values(3, 7, 8), values(3, 7, 8)), {}


class ReturnsArgumentOrCopy(Hazard):
    """`contiguous` gives its own argument back, or a copy."""

    def forward(self, x):
        kept = x.contiguous()
        self.first(x)
        return kept, self.second(x)

    def b(self):
        return (values(7, 3, 8).transpose(0, 1),), {}


class WritesAfterContiguous(Hazard):
    """Whether the write is seen in `kept` depends on the layout."""

    def forward(self, x):
        kept = x.contiguous()
        x.mul_(2)
        return self.first(x) + kept

    def b(self):
        return (values(7, 3, 8).transpose(0, 1),), {}


class ReturnsParameter(Hazard):
    def forward(self, x):
        return self.first(x), self.second.bias


class ReturnsSelf(Hazard):
    def forward(self, x):
        return self, self.first(x)


class ReturnsNothing(Hazard):
    def forward(self, x):
        self.first(x)


class ReturnsNumbers(Hazard):
    def forward(self, x):
        return self.first(x), x.shape[1], tuple(x.shape), x.shape, x.numel() / 2, "text", x.dtype, x.shape[0] > 2


class ReturnsNested(Hazard):
    def forward(self, x):
        y = self.first(x)
        return {"hidden": (y, [y, None]), 3: {"deep": self.second(y)}}, [y.mean()]


class ReturnsSameTwice(Hazard):
    def forward(self, x):
        y = self.first(x)
        return y, y


class OutputIsView(Hazard):
    def forward(self, x):
        y = self.first(x)
        return y[:, 0], y.transpose(0, 1), *y.chunk(2, -1)


class OtherMethod(Hazard):
    """A block that is not called, but whose method is."""

    def forward(self, x):
        return self.encode(x) * self.scale(x)

    def encode(self, x):
        return self.first(x) if x.shape[0] < 3 else self.second(x)

    @staticmethod
    def scale(x):
        return x.shape[1]
