"""Submodules, methods, hooks and parameters that are added, replaced or shared; weights that are read raw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.hazards.base import Hazard


class SubmoduleIsReplaced(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.Tanh()

    def forward(self, x):
        return self.second(self.activation(self.first(x)))

    def turn(self, to_b):
        self.activation = nn.ReLU() if to_b else nn.Tanh()


class LinearIsReplaced(Hazard):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choices = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.third = self.choices[0]

    def forward(self, x):
        return self.third(self.first(x))

    def turn(self, to_b):
        self.third = self.choices[int(to_b)]


class LayersAreAdded(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Tanh()])

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def turn(self, to_b):
        self.layers = nn.ModuleList([nn.Tanh(), nn.Softmax(-1)] if to_b else [nn.Tanh()])


class LayersAreAppended(Hazard):
    """The same, in place: the list stays the same object."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Tanh()])

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def turn(self, to_b):
        del self.layers[1:]
        if to_b:
            self.layers.append(nn.Softmax(-1))


class StepsAreAppended(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Tanh())

    def forward(self, x):
        return self.steps(self.first(x))

    def turn(self, to_b):
        del self.steps[1:]
        if to_b:
            self.steps.append(nn.Softmax(-1))


class MethodIsReplaced(Hazard):
    def finish(self, x):
        return torch.tanh(x)

    def forward(self, x):
        return self.finish(self.first(x))

    def turn(self, to_b):
        vars(self).pop("finish", None)
        if to_b:
            self.finish = torch.sigmoid


class HookIsAdded(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.hooks = []

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def turn(self, to_b):
        while self.hooks:
            self.hooks.pop().remove()
        if to_b:
            self.hooks.append(self.first.register_forward_hook(lambda module, args, result: result * 2))


class BackwardHookIsAdded(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.hooks = []

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def turn(self, to_b):
        while self.hooks:
            self.hooks.pop().remove()
        if to_b:
            self.hooks.append(self.first.register_full_backward_hook(_doubled))


def _doubled(module, gradients, _):
    return tuple(gradient if gradient is None else gradient * 2 for gradient in gradients)


class ForwardIsReplaced(Hazard):
    """An instance's own forward, on a child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Tanh())

    def forward(self, x):
        return self.child(self.first(x))

    def turn(self, to_b):
        vars(self.child).pop("forward", None)
        if to_b:
            self.child.forward = torch.sigmoid


class ParameterIsReplaced(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.first(x) * self.gain

    def turn(self, to_b):
        self.gain = nn.Parameter(torch.full((8,), 2.0) if to_b else torch.ones(8), requires_grad=False)


class ParameterBecomesNone(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x):
        x = self.first(x)
        return x if self.gain is None else x * self.gain

    def turn(self, to_b):
        self.gain = None if to_b else nn.Parameter(torch.full((8,), 2.0), requires_grad=False)


class RawWeights(Hazard):
    def forward(self, x):
        return F.linear(x, self.first.weight, self.first.bias) @ self.second.weight.T


class WeightReadAndCalled(Hazard):
    def forward(self, x):
        return self.first(x) / self.first.weight.norm()


class ScalesParameterInPlace(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, 4))

    def forward(self, x):
        flat = self.gain.detach().view(8)
        flat.mul_(0.5)
        return self.first(x) * flat


class SharedModule(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.first

    def forward(self, x):
        return self.again(torch.tanh(self.first(x)))


class Parent(Hazard):
    """A child that knows its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()
        object.__setattr__(self.child, "parent", self)
        self.scale = 2.0

    def forward(self, x):
        return self.child(self.first(x)) * self.child.parent.scale

    def turn(self, to_b):
        self.scale = 3.0 if to_b else 2.0


class CalledAndRead(Hazard):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + F.linear(x, self.first.weight)
