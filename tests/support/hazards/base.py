"""What every hazard has: two linears to adapt, two calls, and something that changes between the calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLAG = False
Call = tuple[tuple[Any, ...], dict[str, Any]]


def values(*shape: int, seed: int = 3) -> Tensor:
    """Return numbers between -2 and 2 that depend on the shape and the seed only."""
    count = max(1, torch.Size(shape).numel())
    return (torch.arange(torch.Size(shape).numel()) * 37 % 101 + seed).float().mul(4 / (count + 101)).sin().view(shape)


class Hazard(nn.Module):
    """A module on which a capture made from `a()` may be wrong for `b()`, or the second time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

    def a(self) -> Call:
        return (values(2, 5, 8),), {}

    def b(self) -> Call:
        return (-values(3, 7, 8),), {}

    def turn(self, to_b: bool) -> None:
        """Change what lies outside of the arguments, before a call with `b()`; or back, before one with `a()`."""

    def reset(self) -> None:
        """Put what lies outside of the module back to its beginning."""

    def outside(self) -> object:
        """Return what lies outside of the module and that the forward may change."""
