"""A few values of each adapted base weight: enough to tell that an adapter was trained on another base.

Values and not a hash, since the same base is often loaded in another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VALUES = 8
TOLERANCE = 2.0**-6
"""Relative; bfloat16 keeps 8 bits."""


def sample_values(weight: Tensor) -> list[float] | None:
    """Return a few evenly spaced values of a weight; None for one without floating point values to look at."""
    if weight.is_meta or not weight.is_floating_point() or weight.numel() == 0:
        return None
    flat = weight.detach().reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).round().long()
    return [float(value) for value in flat[positions.to(flat.device)].double().cpu()]


def different(saved: Mapping[str, list[float] | None], weights: Mapping[str, Tensor]) -> list[str]:
    """Return the paths whose base weight is not the one that the adapter was trained on."""
    return [path for path, weight in weights.items() if not _same(saved.get(path), sample_values(weight))]


def _same(before: list[float] | None, now: list[float] | None) -> bool:
    if before is None or now is None:
        return True
    scale = max(map(abs, before), default=0.0)
    return all(abs(a - b) <= TOLERANCE * max(abs(a), 1e-3 * scale) for a, b in zip(before, now, strict=True))
