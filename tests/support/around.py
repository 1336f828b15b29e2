"""For the tests of what stands around a model."""

from __future__ import annotations

import functools

import torch
from torch import nn

import lora_fx

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
"""Results in float32 of a few short sums, near 1: some hundred roundings."""


def filled(tuned: nn.Module, scale: float = 0.3) -> nn.Module:
    """Return the adapted model itself, with values in all that it trains: the adapters have an effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return tuned
