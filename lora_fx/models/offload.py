"""Weights that accelerate keeps elsewhere (cpu_offload, disk_offload, device_map): on meta between two calls."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.overrides import accelerate_hooks
from lora_fx.models.packed import PackedWeight, is_packed


def offloading_hook(module: nn.Module) -> Any:
    """Return accelerate's hook that loads the module's own weights for each call and drops them after it, or None."""
    return next((hook for hook in accelerate_hooks(module) if getattr(hook, "offload", False)), None)


def offloaded_in(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the modules whose own weights are kept elsewhere, "(root)" for the model itself."""
    return (path or "(root)" for path, module in model.named_modules() if offloading_hook(module) is not None)


def stored_weight(owner: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of the module with its values, also where they are offloaded, even in a file.

    Of a packed layer it is a PackedWeight.

    Raises:
        KeyError: the module has no such parameter and no such buffer.
    """
    if name == "weight" and is_packed(owner):
        return PackedWeight(owner)
    held, hook = owner._parameters if name in owner._parameters else owner._buffers, offloading_hook(owner)
    weight = held[name]
    if weight is None:
        raise KeyError(name)
    if hook is None or not weight.is_meta:
        return weight
    value: Tensor = hook.weights_map[name]
    return value


def computing_device(owner: nn.Module, weight: Tensor) -> torch.device:
    """Return the device on which the module computes with the weight: not that of an offloaded one."""
    hook = offloading_hook(owner)
    if hook is None or hook.execution_device is None:
        return weight.device
    return torch.device(hook.execution_device)


def keep_loaded(owner: nn.Module) -> None:
    """Load the module's own parameters for good, in place, onto the device on which it computes."""
    hook = offloading_hook(owner)
    if hook is None:
        return
    for name, parameter in list(owner._parameters.items()):
        if parameter is not None and parameter.is_meta:
            value = stored_weight(owner, name).to(computing_device(owner, parameter))
            owner._parameters[name] = nn.Parameter(value, parameter.requires_grad)
    hook.offload = False
