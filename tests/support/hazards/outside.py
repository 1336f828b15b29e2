"""What lies outside of the module: globals, closures, caches, environment, torch's own flags."""

from __future__ import annotations

import enum
import functools
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.hazards import base
from tests.support.hazards.base import Hazard, values

SCALE = 2.0
SHIFT = torch.zeros(8)
SCALES = [2.0]
OPTIONS = {"layer": "first"}
LOG: list[int] = []


def activation(x):
    return torch.tanh(x)


def relu(x):
    return torch.relu(x)


_TANH = activation


class GlobalNumberChanges(Hazard):
    def forward(self, x):
        return self.first(x) * SCALE

    def turn(self, to_b):
        global SCALE
        SCALE = 3.0 if to_b else 2.0


class GlobalTensorChanges(Hazard):
    def forward(self, x):
        return self.first(x) + SHIFT

    def turn(self, to_b):
        SHIFT.fill_(1.0 if to_b else 0.0)


class GlobalListChanges(Hazard):
    def forward(self, x):
        for scale in SCALES:
            x = self.first(x) * scale
        return x

    def turn(self, to_b):
        SCALES[:] = [2.0, 3.0] if to_b else [2.0]


class GlobalDictChanges(Hazard):
    def forward(self, x):
        return self.first(x) if OPTIONS["layer"] == "first" else self.second(x)

    def turn(self, to_b):
        OPTIONS["layer"] = "second" if to_b else "first"


class GlobalFunctionChanges(Hazard):
    def forward(self, x):
        return activation(self.first(x))

    def turn(self, to_b):
        global activation
        activation = relu if to_b else _TANH


class GlobalNumberInHelper(Hazard):
    """Not the forward itself reads it, but a function that it calls."""

    def forward(self, x):
        return _scaled(self.first(x))

    def turn(self, to_b):
        global SCALE
        SCALE = 3.0 if to_b else 2.0


def _scaled(x):
    return x * SCALE


class GlobalModuleAttributeChanges(Hazard):
    """A flag in another module, reached by attribute."""

    def forward(self, x):
        return self.second(x) if base.FLAG else self.first(x)

    def turn(self, to_b):
        base.FLAG = to_b


class WritesGlobalList(Hazard):
    def forward(self, x):
        LOG.append(int(x.shape[0]))
        return self.first(x)

    def reset(self):
        LOG.clear()

    def outside(self):
        return list(LOG)


class CountsInGlobal(Hazard):
    calls = 0

    def forward(self, x):
        CountsInGlobal.calls += 1
        return self.first(x) * CountsInGlobal.calls

    def reset(self):
        CountsInGlobal.calls = 0

    def outside(self):
        return CountsInGlobal.calls


class ClosureChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        scale = 2.0

        def scaled(x):
            return x * scale

        def change(value):
            nonlocal scale
            scale = value

        self.scaled, self.change = scaled, change

    def forward(self, x):
        return self.scaled(self.first(x))

    def turn(self, to_b):
        self.change(3.0 if to_b else 2.0)


class MutableDefault(Hazard):
    def forward(self, x, seen=[]):  # noqa: B006
        seen.append(1)
        return self.first(x) * len(seen)

    def reset(self):
        MutableDefault.forward.__defaults__[0].clear()


class DefaultArgumentChanges(Hazard):
    def forward(self, x, scale=2.0):
        return self.first(x) * scale

    def turn(self, to_b):
        DefaultArgumentChanges.forward.__defaults__ = (3.0 if to_b else 2.0,)


@functools.lru_cache(maxsize=8)
def _positions(length):
    return torch.arange(length).float().sin()


class CachedHelper(Hazard):
    def forward(self, x):
        return self.first(x) + _positions(x.shape[1])[None, :, None]

    def reset(self):
        _positions.cache_clear()


@functools.lru_cache(maxsize=8)
def _window():
    return torch.arange(8).float().sin()


class CachedConstant(Hazard):
    def forward(self, x):
        return self.first(x) * _window()

    def reset(self):
        _window.cache_clear()


class EnvironmentChanges(Hazard):
    def forward(self, x):
        return self.first(x) if os.environ.get("LORA_FX_TEST_LAYER", "first") == "first" else self.second(x)

    def turn(self, to_b):
        os.environ["LORA_FX_TEST_LAYER"] = "second" if to_b else "first"


class DefaultDtypeChanges(Hazard):
    def forward(self, x):
        return self.first(x) + torch.linspace(0, 1, 8)

    def turn(self, to_b):
        torch.set_default_dtype(torch.float64 if to_b else torch.float32)


class AsksDeterminism(Hazard):
    def forward(self, x):
        return self.first(x) if torch.are_deterministic_algorithms_enabled() else self.second(x)

    def turn(self, to_b):
        torch.use_deterministic_algorithms(to_b)


class AsksBackendFlag(Hazard):
    def forward(self, x):
        return (
            self.first(x) if torch.backends.mkldnn.flags and torch.backends.cuda.matmul.allow_tf32 else self.second(x)
        )

    def turn(self, to_b):
        torch.backends.cuda.matmul.allow_tf32 = to_b


class AsksWhetherCompiling(Hazard):
    def forward(self, x):
        return self.second(x) if torch.compiler.is_compiling() or torch.jit.is_tracing() else self.first(x)


class AsksNumberOfThreads(Hazard):
    def forward(self, x):
        return self.first(x) * torch.get_num_threads()


class GlobalHookIsAdded(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.hooks = []

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def turn(self, to_b):
        while self.hooks:
            self.hooks.pop().remove()
        if to_b:
            hook = nn.modules.module.register_module_forward_hook(_double_tensors)
            self.hooks.append(hook)


def _double_tensors(module, args, result):
    return result * 2 if isinstance(module, nn.Linear) else None


class Warns(Hazard):
    def forward(self, x):
        warnings.warn("deprecated", DeprecationWarning, stacklevel=2)
        return self.first(x)


class FunctionIsPatched(Hazard):
    """torch.nn.functional.silu is another function for a while."""

    def forward(self, x):
        return F.silu(self.first(x))

    def turn(self, to_b):
        F.silu = F.gelu if to_b else _SILU


_SILU = F.silu


class Colour(enum.Enum):
    RED = "first"
    BLUE = "second"


class Layers(enum.Flag):
    FIRST = enum.auto()
    SECOND = enum.auto()


class EnumAttributeChanges(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.colour = Colour.RED

    def forward(self, x):
        return getattr(self, self.colour.value)(x)

    def turn(self, to_b):
        self.colour = Colour.BLUE if to_b else Colour.RED


class EnumArgument(Hazard):
    def forward(self, x, colour):
        return self.first(x) if colour is Colour.RED else self.second(x)

    def a(self):
        return (values(2, 5, 8), Colour.RED), {}

    def b(self):
        return (values(2, 5, 8), Colour.BLUE), {}


class FlagArgument(Hazard):
    def forward(self, x, layers):
        x = self.first(x) if layers & Layers.FIRST else x
        return self.second(x) if layers & Layers.SECOND else x

    def a(self):
        return (values(2, 5, 8), Layers.FIRST), {}

    def b(self):
        return (values(2, 5, 8), Layers.FIRST | Layers.SECOND), {}
