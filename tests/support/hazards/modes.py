"""Gradients, autocast, dropout and transforms inside a forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.hazards.base import Hazard, values


class WithoutGradients(Hazard):
    def forward(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.second(x))
        return self.first(x) * gate


class WithoutGradientsAsDecorator(Hazard):
    @torch.no_grad()
    def _gate(self, x):
        return torch.sigmoid(self.second(x))

    def forward(self, x):
        return self.first(x) * self._gate(x)


class WithGradients(Hazard):
    def forward(self, x):
        with torch.enable_grad():
            return self.first(x).square() + self.second(x)


class InferenceInside(Hazard):
    def forward(self, x):
        with torch.inference_mode():
            scale = x.abs().max() + 1
        return self.first(x) / scale.clone()


class GradientsByFlag(Hazard):
    def forward(self, x):
        with torch.set_grad_enabled(not self.training):
            y = self.second(x)
        return self.first(x) + y


class Detached(Hazard):
    def forward(self, x):
        y = self.first(x)
        return y + (self.second(y).detach() - y.detach())


class AsksRequiresGrad(Hazard):
    def forward(self, x):
        return self.first(x) if x.requires_grad else self.second(x)


class AsksParameterRequiresGrad(Hazard):
    def forward(self, x):
        return self.first(x) if self.second.weight.requires_grad else self.second(x)


class AsksIntermediateRequiresGrad(Hazard):
    def forward(self, x):
        y = x * 2
        return self.first(y) if y.requires_grad else self.second(y)


class AsksGradMode(Hazard):
    def forward(self, x):
        return self.first(x) if torch.is_grad_enabled() else self.second(x)


class AsksGradFunction(Hazard):
    def forward(self, x):
        return self.first(x) if x.grad_fn is None else self.second(x)


class AsksLeaf(Hazard):
    def forward(self, x):
        return self.first(x) if x.is_leaf else self.second(x)


class ScalesGradient(Hazard):
    """A hook on an intermediate tensor: it acts in the backward only."""

    def forward(self, x):
        y = self.first(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 3)
        return self.second(y)


class AutocastOff(Hazard):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.first(x.float())


class AutocastOn(Hazard):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
        return self.second(y.to(x.dtype))


class AsksAutocast(Hazard):
    def forward(self, x):
        return self.first(x) if torch.is_autocast_enabled("cpu") else self.second(x)


class DropoutCalled(Hazard):
    def forward(self, x):
        return F.dropout(self.first(x), 0.3, training=self.training)


class DropoutAlways(Hazard):
    def forward(self, x):
        return F.dropout(self.first(x), 0.3)


class DropoutModule(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.second(self.drop(torch.relu(self.first(x))))


class DropoutModuleFrozen(Hazard):
    """The parent trains, its dropout does not."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.first(x))

    def turn(self, to_b):
        self.drop.training = self.training and not to_b


class DropoutRateChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.first(x))

    def turn(self, to_b):
        self.drop.p = 0.6 if to_b else 0.3


class AttentionModule(Hazard):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, mask=None):
        y, _ = self.attention(self.first(x), x, x, key_padding_mask=mask)
        return self.second(y)

    def b(self):
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[1, 5:] = True
        return (values(3, 7, 8),), {"mask": mask}


class MissesInTraining(Hazard):
    """A call of another structure in the middle of training; its backward needs the statistics as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x, twice=False):
        y = self.second(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2))
        return 2 * y if twice and self.training else y

    def b(self):
        return (values(3, 7, 8),), {"twice": True}


class Vmapped(Hazard):
    def forward(self, x):
        return self.second(torch.vmap(lambda row: row * row.sum(), in_dims=0)(self.first(x)))


class GradientInside(Hazard):
    def forward(self, x):
        slope = torch.func.grad(lambda value: value.pow(3).sum())(x)
        return self.first(x) + slope


class AutogradInside(Hazard):
    def forward(self, x):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(point.pow(3).sum(), point)
        return self.first(x) + slope


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, limit):
        ctx.limit = limit
        return value.clamp(-limit, limit)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.limit, None


class OwnBackward(Hazard):
    def forward(self, x):
        return self.second(_Clamp.apply(self.first(x), 0.4))


class Recomputed(Hazard):
    def _part(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        return self.second(checkpoint(self._part, x, use_reentrant=False))


class RecomputedWithReentry(Hazard):
    def _part(self, x):
        return F.dropout(torch.tanh(self.first(x)), 0.2, self.training)

    def forward(self, x):
        return self.second(checkpoint(self._part, x, use_reentrant=True))


class ConditionalOperator(Hazard):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (self.first(x),))
