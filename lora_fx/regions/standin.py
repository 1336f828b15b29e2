"""Stand-ins: copies of a block to try things on, so that a proof leaves no trace in the user's model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.swap import origin

REGION = "lora_fx_region"
"""Attribute of a module that is a region."""
_NOISE = 0.02


def stand_in(module: nn.Module) -> nn.Module:
    """Return a copy of a block that shares its parameters, has buffers of its own, and runs no graphs."""
    duplicate: nn.Module = copy.deepcopy(module, {id(each): each for each in _shared(module)})
    for each in duplicate.modules():
        if each.__dict__.pop(REGION, None) is not None:
            each.__class__ = origin(type(each))[0]
    return duplicate


def _shared(module: nn.Module) -> Iterator[Any]:
    """Yield what a copy shares: parameters, hooks, and what lies outside (a parent model, a table)."""
    yield from module.parameters()
    own = {id(each) for each in (*module.modules(), *module.buffers())}
    for each in module.modules():
        for value in vars(each).values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, (Tensor, nn.Module)) and id(item) not in own:
                    yield item
        for table in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
            yield from table.values()


def with_noise(duplicate: nn.Module) -> nn.Module:
    """Return the stand-in itself, with factors in every adapter that show.

    With B = 0, as adapters start, a graph that leaves one out or feeds it the wrong input would look right.
    """
    generator = torch.Generator().manual_seed(0)
    for _, found in all_attached(duplicate):
        for factor in (found.lora_A, found.lora_B):
            noise = torch.randn(factor.weight.shape, generator=generator, dtype=torch.float32) * _NOISE
            factor.weight = nn.Parameter(noise.to(factor.weight))
    return duplicate
