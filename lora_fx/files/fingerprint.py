"""A few values of each adapted base weight: enough to tell that an adapter was trained on another base.

Values and not a hash, since the same base is often loaded in another dtype.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fx.models.quantised import is_quantised
from lora_fx.models.shards import is_sharded, values_at
from lora_fx.models.together import PLAIN

VALUES = 8
TOLERANCE = 2.0**-6
"""Relative; bfloat16 keeps 8 bits."""


def sample_values(weight: Tensor) -> list[float] | None:
    """Return a few evenly spaced values of a weight; None for one without floating point values to look at.

    None for a quantised one too: its adapter fits the base that was quantised, whose values differ by more than a few
    roundings.  Of a sharded one every process must ask.
    """
    if is_quantised(weight) or weight.is_meta or not weight.is_floating_point() or weight.numel() == 0:
        return None
    if is_sharded(weight):
        return [float(value) for value in values_at(weight, sample_positions(weight.numel()))]
    flat = weight.detach().reshape(-1)
    positions = torch.tensor(sample_positions(flat.numel()), device=flat.device)
    found: list[float] = flat[positions].double().tolist()
    return found


class SampledWeights:
    """Weights whose `sample_values` may be asked for again, while they are of the same kinds and sizes."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._places: list[tuple[list[int], Sequence[Tensor]]] = []
        """Of plain weights of a dtype and device, their numbers and where each is looked at."""
        alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for number, weight in enumerate(weights):
            if _is_plain(weight) and weight.dtype.is_floating_point and not weight.is_meta and weight.numel():
                alike.setdefault((weight.dtype, weight.device), []).append(number)
        for (_, device), numbers in alike.items():
            places = torch.tensor([sample_positions(weights[at].numel()) for at in numbers], device=device)
            self._places.append((numbers, places.unbind()))

    def values(self) -> list[list[float] | None]:
        """Return `sample_values` of each, as they are now: plain ones in one operation each, and one for a dtype."""
        found = [None if _is_plain(weight) else sample_values(weight) for weight in self._weights]
        with torch.no_grad():
            for numbers, places in self._places:
                looked = [self._weights[at].take(where) for at, where in zip(numbers, places, strict=True)]
                for at, values in zip(numbers, torch.stack(looked).double().tolist(), strict=True):
                    found[at] = values
        return found


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in PLAIN and weight.layout is torch.strided


@functools.lru_cache(maxsize=1024)
def sample_positions(number: int) -> tuple[int, ...]:
    """Return where `sample_values` looks in a weight of so many values."""
    return tuple(map(int, torch.linspace(0, number - 1, VALUES, dtype=torch.float64).round().tolist()))


def same_values(before: list[float] | None, now: list[float] | None) -> bool:
    """Whether two samples are of one weight, perhaps in another dtype; unknown ones count as the same."""
    if before is None or now is None:
        return True
    scale = max(map(abs, before), default=0.0)
    near = [abs(a - b) <= TOLERANCE * max(abs(a), 1e-3 * scale) for a, b in zip(before, now, strict=True)]
    return all(near)
