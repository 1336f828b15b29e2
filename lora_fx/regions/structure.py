"""What is equal for identical blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_fx.adapters.attach import attached_to, shown_parameters
from lora_fx.models.swap import original_class


def structure_of(module: nn.Module) -> tuple[Any, ...]:
    """Return what is equal for identical blocks: classes, names, shapes, dtypes, adapters."""
    return tuple(_facts(path, each) for path, each in module.named_modules())


def _facts(path: str, module: nn.Module) -> tuple[Any, ...]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype, tensor.device) for name, tensor in tensors)
    adapters = tuple((each.spec.lora, each.spec.mixed, each.spec.parameter, each.call) for each in attached_to(module))
    return (path, original_class(module), shapes, adapters, shown_parameters(module))
