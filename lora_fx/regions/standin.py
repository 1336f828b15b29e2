"""Stand-ins: copies of a block to try things on, so that a proof leaves no trace in the user's model."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lora_fx.adapters.attach import all_attached
from lora_fx.capture.tracing.copies import shared_by_copies
from lora_fx.models.swap import origin

REGION = "lora_fx_region"
"""Attribute of a module that is a region."""
_NOISE = 0.02


def stand_in(module: nn.Module) -> nn.Module:
    """Return a copy of a block that shares its parameters, has buffers of its own, and runs no graphs."""
    duplicate: nn.Module = copy.deepcopy(module, {id(each): each for each in shared_by_copies(module)})
    for each in duplicate.modules():
        if each.__dict__.pop(REGION, None) is not None:
            each.__class__ = origin(type(each))[0]
    return duplicate


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
