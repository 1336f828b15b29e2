"""Who reads a parameter by its name: code that computes with it, or code that handles the parameter itself."""

import sys
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor, nn

from lora_fx.models.torch_internals import rebuilds_graph

_HANDLERS = ("torch.nn.modules.module", "torch.nn.utils.", "torch.fx.graph", "torch.distributed.", "accelerate.")
"""Modules that read an attribute to move, copy, shard or return the parameter itself."""
_COMPUTING = ("forward", "compute_weight")
"""Functions of torch.nn.utils that compute with it: of parametrizations, weight_norm and spectral_norm."""


def wants_parameter() -> bool:
    """Whether the code that reads a weight (through a property) handles parameters, and multiplies nothing by them."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name == "__getattribute__":  # of a subclass, around ours
        frame = frame.f_back
    name = str(frame.f_globals.get("__name__", ""))
    if rebuilds_graph(frame):
        return True
    computes = name.startswith("torch.nn.utils.") and frame.f_code.co_name in _COMPUTING
    return name.startswith(_HANDLERS) and not computes


def take_over(name: str) -> Callable[[nn.Module, Tensor], None]:
    """Return the setter of a property that shows a parameter: for what nn.DataParallel sends to a replica."""

    def take(owner: nn.Module, value: Tensor) -> None:
        owner._parameters[name] = value  # type: ignore[assignment]

    return take


def is_distributing(frame: FrameType) -> bool:
    """Whether the code of a frame, that asks a module for its `named_modules`, is torch's `distribute_module`."""
    while frame.f_back is not None and frame.f_code.co_name == "named_modules":  # of a subclass, around ours
        frame = frame.f_back
    is_named = frame.f_code.co_name == "distribute_module"
    return is_named and str(frame.f_globals.get("__name__", "")).startswith("torch.distributed.")
