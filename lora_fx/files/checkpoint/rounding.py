"""One rounding: to the nearest value, or to one of the two neighbours with the odds that make the mean right."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")
_INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
_AT_ONCE = 1 << 14
_PER_COUNTER = 8
"""Numbers of 32 bits that Philox gives for each of its counters."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Random numbers of a tensor's elements: a function of seed, tensor name and position, however it is cut up."""

    seed: int
    name: str

    def uniform(self, first: int, number: int) -> Tensor:
        """Return the numbers of elements `first` and following, multiples of 2⁻²⁴ in [0, 1), float32."""
        import numpy as np

        key = int.from_bytes(hashlib.sha256(f"{self.seed}\0{self.name}".encode()).digest()[:16], "little")
        counter, skipped = divmod(first, _PER_COUNTER)
        counters = -(-(skipped + number) // _PER_COUNTER)
        raw = np.random.Philox(key=key, counter=counter).random_raw(4 * counters)
        numbers = raw.astype("<u8", copy=False).view("<u4")[skipped : skipped + number] >> 8
        return torch.from_numpy(numbers.astype(np.float32)).mul_(2.0**-24)


def round_into(wide: Tensor, out: Tensor, noise: Noise, first: int) -> None:
    """Round `wide` into `out`, both flat, up or down as the noise says.

    Args:
        first: position in the tensor of the first element, for the noise.
    """
    if torch.promote_types(wide.dtype, out.dtype) == out.dtype:  # that is exact
        out.copy_(wide)
        return
    for start in range(0, wide.numel(), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        _stochastic(wide[part], out[part], noise.uniform(first + start, wide[part].numel()))


def _stochastic(wide: Tensor, out: Tensor, uniform: Tensor) -> None:
    """Round towards zero, or away from it with probability (|x| − lower) / (upper − lower).

    The bits of a float of one sign, read as an integer, grow with its magnitude: ±1 is the neighbour.
    """
    out.copy_(wide)
    bits = out.view(_INTEGER[out.dtype])
    finite = torch.isfinite(out)  # what overflows when rounded to the nearest stays so, and is reported
    bits.sub_(((out.to(wide.dtype).abs() > wide.abs()) & finite).to(bits.dtype))
    lower = out.to(wide.dtype)
    upper = (bits + finite.to(bits.dtype)).view(out.dtype).to(wide.dtype)
    share = (wide - lower) / (upper - lower)  # exact: both differences and the gap, a power of two
    bits.add_((uniform.to(share.dtype) < share).to(bits.dtype))
