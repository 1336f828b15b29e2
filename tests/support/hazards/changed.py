"""Attributes that somebody else changes between calls: numbers, configurations, containers, functions, tensors."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from tests.support.hazards.base import Hazard


class AttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x):
        return self.first(x) * self.scale

    def turn(self, to_b):
        self.scale = 3.0 if to_b else 2.0


class ClassAttributeChanges(Hazard):
    scale = 2

    def forward(self, x):
        return self.first(x) * self.scale

    def turn(self, to_b):
        ClassAttributeChanges.scale = 3 if to_b else 2


class PropertyChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self._half = 1.0

    @property
    def scale(self):
        return 2 * self._half

    def forward(self, x):
        return self.first(x) * self.scale

    def turn(self, to_b):
        self._half = 1.5 if to_b else 1.0


class Settings:
    def __init__(self, **settings) -> None:
        vars(self).update(settings)

    def __repr__(self) -> str:
        return repr(vars(self))


class ConfigurationChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.config = Settings(layer="first")

    def forward(self, x):
        return getattr(self, self.config.layer)(x)

    def turn(self, to_b):
        self.config.layer = "second" if to_b else "first"


class NestedConfigurationChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.config = Settings(text=Settings(scale=2.0))

    def forward(self, x):
        return self.first(x) * self.config.text.scale

    def turn(self, to_b):
        self.config.text.scale = 3.0 if to_b else 2.0


class NamespaceChanges(Hazard):
    """As a configuration, but its class cannot be subclassed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=2.0)

    def forward(self, x):
        return self.first(x) * self.config.scale

    def turn(self, to_b):
        self.config.scale = 3.0 if to_b else 2.0


class DictAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.options = {"scale": 2.0}

    def forward(self, x):
        return self.first(x) * self.options["scale"]

    def turn(self, to_b):
        self.options["scale"] = 3.0 if to_b else 2.0


class ListAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [2.0, 1.0]

    def forward(self, x):
        for scale in self.scales:
            x = self.first(x) * scale
        return x

    def turn(self, to_b):
        self.scales[:] = [3.0] if to_b else [2.0, 1.0]


class SetAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.wanted = {"first"}

    def forward(self, x):
        return self.first(x) if "first" in self.wanted else self.second(x)

    def turn(self, to_b):
        self.wanted.clear()
        self.wanted.add("second" if to_b else "first")


class FunctionAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.activation = torch.tanh

    def forward(self, x):
        return self.activation(self.first(x))

    def turn(self, to_b):
        self.activation = F.relu if to_b else torch.tanh


class PartialAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.activation = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x):
        return self.activation(self.first(x))

    def turn(self, to_b):
        self.activation = functools.partial(F.leaky_relu, negative_slope=0.4 if to_b else 0.1)


class TensorAttributeAppears(Hazard):
    """Somebody gives the module a plain tensor attribute (steering vectors)."""

    def forward(self, x):
        steering = getattr(self, "steering", None)
        return self.first(x) if steering is None else self.first(x) + steering

    def turn(self, to_b):
        if to_b:
            self.steering = torch.ones(8)
        else:
            vars(self).pop("steering", None)


class ReadsItsOwnDict(Hazard):
    """`vars(self)` passes by every way in which attributes are looked up."""

    def forward(self, x):
        return self.first(x) * vars(self).get("scale", 1.0)

    def turn(self, to_b):
        vars(self).pop("scale", None)
        if to_b:
            self.scale = 2.0


class TensorAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.steering = torch.zeros(8)

    def forward(self, x):
        return self.first(x) + self.steering

    def turn(self, to_b):
        self.steering = torch.ones(8) if to_b else torch.zeros(8)


class TensorListAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.steering = [torch.zeros(8)]

    def forward(self, x):
        return self.first(x) + self.steering[0]

    def turn(self, to_b):
        self.steering[0] = torch.ones(8) if to_b else torch.zeros(8)


class NumpyAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.window = torch.ones(8).numpy()

    def forward(self, x):
        return self.first(x) * torch.as_tensor(self.window)

    def turn(self, to_b):
        self.window[:] = 2 if to_b else 1
