"""What holds the modules of adapters, each by its adapter's name."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from lora_fx.errors import RefusedError
from lora_fx.models.walking import as_usual, named_modules_of

_PEFT = "peft.tuners"
"""The package of PEFT that looks through a model before it puts adapters into it; prompts for a model are elsewhere."""
_LISTS = "torch.nn.modules.module"


def _refuse_peft(frame: FrameType | None) -> None:
    """Raise RefusedError if PEFT is about to put adapters into an adapted model, by the frame that lists its modules.

    It would take our factors for its own, put them into its files, let graphs of GraphModules call its layers for ours,
    and merge into the base's memory, which the caller's model shares.
    """
    while frame is not None and frame.f_globals.get("__name__") == _LISTS:
        frame = frame.f_back
    if frame is not None and str(frame.f_globals.get("__name__", "")).startswith(f"{_PEFT}."):
        raise RefusedError(
            "PEFT cannot put adapters into a model that lora_fx has adapted",
            advice='lora_fx.add(tuned, lora_fx.rules_from_peft(config), adapter="b") or lora_fx.add(tuned, directory, '
            'adapter="b") puts one beside; lora_fx.to_peft(tuned) gives a PeftModel, which takes more',
        )


KEPT, KEPT_TARGETS = "lora_fx_base", "lora_fx_targets"
"""Attributes of an adapted model: what a swap has found out about its base, and about an adapter."""

_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))


def unspeakable(adapter: str) -> bool:
    """Whether code cannot name the modules of an adapter: what holds them has an attribute of that name."""
    return adapter in _ATTRIBUTES


class AdapterDict(nn.ModuleDict):
    """Modules by the name of their adapter, which may be that of an attribute of ModuleDict, as `train` is."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]

    @as_usual
    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """Return what every module does.

        Raises:
            RefusedError: PEFT asks, to put modules of its own in the place of this model's.
        """
        if not torch.compiler.is_compiling() and _PEFT in sys.modules:
            _refuse_peft(sys._getframe(1))
        return super().named_modules(memo, prefix, remove_duplicate)

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
    """Yield what `named_modules` does, in its order, of modules that hold adapters.

    In one loop: `named_modules` passes each module through all the levels above it.
    """
    met: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in met:
            continue
        met.add(id(module))
        children = module._modules
        if not children:
            continue
        prefix, holds = f"{path}." if path else "", "lora_A" in children
        for name, child in reversed(children.items()):
            holds = holds or isinstance(child, AdapterHome)
            if child is not None and not isinstance(child, AdapterDict):
                waiting.append((prefix + name, child))
        if holds:
            yield path, module
