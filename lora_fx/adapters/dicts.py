"""What holds the modules of adapters, each by its adapter's name."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_fx.models.walking import named_modules_of


class AdapterDict(nn.ModuleDict):
    """Modules by the name of their adapter, which may be that of an attribute of ModuleDict, as `train` is."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":  # the mode, whatever an adapter is called
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class AdapterHome(nn.Module):
    """Holds the adapter of a raw parameter: `<parameter>_lora.lora_A.<adapter>.weight` and the rest."""

    lora_A: Any
    lora_B: Any

    def __init__(self, parameter: str) -> None:
        super().__init__()
        self.parameter = parameter


def modules_beside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what `named_modules` yields, in its order, without what is in adapters, of which there may be many."""
    return named_modules_of(model, (AdapterDict,))


def without_factors(model: nn.Module) -> list[nn.Module]:
    """Return all modules of a model and what holds its adapters, but not what is in an adapter."""
    found = [module for _, module in modules_beside(model)]
    held = [child for module in found for child in module._modules.values() if isinstance(child, AdapterDict)]
    return list({id(module): module for module in (*found, *held)}.values())


def holding_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` does, in its order, but for modules that hold none, and what is in adapters.

    In one loop: `named_modules` passes each module through all the levels above it.
    """
    met, waiting = set(), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in met:
            continue
        met.add(id(module))
        prefix = f"{path}." if path else ""
        children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
        if children:
            yield path, module
            waiting += [pair for pair in reversed(children) if not isinstance(pair[1], AdapterDict)]
