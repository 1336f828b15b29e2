"""The grid that the codes of a quantised weight lie on: value = scale · (code - zero), block by block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.models.quantised import dense


@dataclass(frozen=True, slots=True)
class Grid:
    """Which values [out, in] the codes of a weight can stand for; scales and zeros are spread over their blocks."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes [out, in] stand for, in float32."""
        return (codes - self.zero) * self.scale

    def nearest(self, values: Tensor) -> Tensor:
        """Return the codes [out, in], as float32, whose values are nearest to these."""
        return (values / self.scale + self.zero).round().clamp(self.low, self.high)

    def part(self, columns: Tensor) -> "Grid":
        """Return the grid of chosen columns."""
        return Grid(self.scale[:, columns], self.zero[:, columns], self.low, self.high)


def codes_of(weight: Tensor) -> Tensor:
    """Return the codes [out, in] of a weight that has a grid, as float32."""
    codes: Tensor = weight.qdata  # type: ignore[attr-defined]
    return codes.float()


def grid_of(weight: Tensor) -> Grid | None:
    """Return the grid of a quantised matrix; None where its codes are packed, or stand for values in another way.

    Codes are read as torchao's weights of whole bytes have them (`IntxUnpackedToInt8Tensor`, `Int8Tensor`), and only
    where they then give what the weight itself says that they stand for.
    """
    codes, block = getattr(weight, "qdata", None), getattr(weight, "block_size", None)
    scale, zero = getattr(weight, "scale", None), getattr(weight, "zero_point", None)
    if not isinstance(codes, Tensor) or not isinstance(scale, Tensor) or block is None:
        return None
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape != weight.shape or len(block) != 2:
        return None
    blocks = math.prod(size // step for size, step in zip(codes.shape, block, strict=True))
    if any(numbers is not None and numbers.numel() != blocks for numbers in (scale, zero)):
        return None
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    low = -(1 << (bits - 1)) // (2 if getattr(weight, "reduce_range", False) else 1)
    spread = _spread(scale, codes.shape, block)
    shift = torch.zeros_like(spread) if zero is None else _spread(zero, codes.shape, block)
    grid, plain = Grid(spread.where(spread != 0, 1.0), shift, low, -low - 1), dense(weight).float()
    rounding = torch.finfo(weight.dtype).eps * plain.abs().max()
    right = bool(torch.all((grid.values(codes.float()) - plain).abs() <= rounding))
    return grid if right and bool(((codes >= low) & (codes <= grid.high)).all()) else None


def with_codes(weight: Tensor, codes: Tensor) -> Tensor:
    """Return a weight on the grid of another one, which stays unchanged, with codes [out, in] of its own."""
    names, context = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(weight, name) for name in names}
    parts["qdata"] = codes.to(torch.int8)
    made: Tensor = type(weight).__tensor_unflatten__(  # type: ignore[attr-defined]
        {name: part.clone() for name, part in parts.items()}, context, weight.size(), weight.stride()
    )
    return made


def _spread(numbers: Tensor, shape: torch.Size, block: Sequence[int]) -> Tensor:
    rows, columns = (size // step for size, step in zip(shape, block, strict=True))
    wide = numbers.float().reshape(rows, columns)
    return wide.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
