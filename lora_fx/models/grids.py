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
    fixed: Tensor | None = None
    """Codes [out, in] that are not chosen; NaN where they are."""

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes [out, in] stand for, in float32."""
        return (codes - self.zero) * self.scale

    def nearest(self, values: Tensor) -> Tensor:
        """Return the codes [out, in], as float32, whose values are nearest to these."""
        codes = (values / self.scale + self.zero).round().clamp(self.low, self.high)
        return codes if self.fixed is None else codes.where(self.fixed.isnan(), self.fixed)

    def part(self, columns: Tensor | slice) -> "Grid":
        """Return the grid of chosen columns; of a slice it is a view."""
        fixed = None if self.fixed is None else self.fixed[:, columns]
        return Grid(self.scale[:, columns], self.zero[:, columns], self.low, self.high, fixed)


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


def q4_0_grid(weight: Tensor) -> Grid | None:
    """Return the grid that GGUF's Q4_0 gives a matrix [out, in]; None where it has none.

    32 values that follow each other in a row have one scale d, in float16: the value of the largest size over -8.  Its
    own code stays 0, so that whoever quantises values on this grid to Q4_0 finds the same d and the same codes.
    Blocks of zeros, and of values too small for a d, stay zeros.

    None: rows are no multiple of 32, or a d is beyond float16.

    Source: ggml's `quantize_row_q4_0_ref`; gguf 0.19, `quants.Q4_0`.
    """
    if weight.dim() != 2 or weight.shape[1] % _Q4_0_BLOCK:
        return None
    blocks = weight.detach().float().reshape(len(weight), -1, _Q4_0_BLOCK)
    largest = blocks.abs().argmax(-1, keepdim=True)
    d = (blocks.gather(-1, largest) / -8).half().float()
    if not bool(d.isfinite().all()):
        return None
    fixed = torch.full_like(blocks, torch.nan).scatter_(-1, largest, 0.0)
    fixed = torch.where(d == 0, 8.0, fixed)
    scale = torch.where(d == 0, 1.0, d).expand_as(blocks)
    return Grid(scale.flatten(1), torch.full_like(scale, 8.0).flatten(1), 0, 15, fixed.flatten(1))


_Q4_0_BLOCK = 32


def grid_of_groups(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Grid | None:
    """Return the grid of a matrix [out, in] with a scale for each group of a row, each row, or all; None if off it.

    Args:
        values: what the codes stand for.
        scale: [out, groups], [out, 1] or one number; zero likewise.
        zero: the code of 0; None where that is 0.
        bits: of a code, from -2^(bits - 1) on.
    """
    rows, columns = values.shape
    wide = [
        t.float().reshape(-1, t.shape[-1] if t.dim() > 1 else 1).expand(rows, -1)
        for t in (scale, zero)
        if t is not None
    ]
    if any(columns % one.shape[1] for one in wide):
        return None
    spread = [one.repeat_interleave(columns // one.shape[1], 1) for one in wide]
    low = -(1 << (bits - 1))
    grid = Grid(spread[0], spread[1] if zero is not None else torch.zeros_like(spread[0]), low, -low - 1)
    plain = values.float()
    rounding = torch.finfo(values.dtype).eps * plain.abs().max()
    right = bool(torch.all((grid.values(grid.nearest(plain)) - plain).abs() <= rounding))
    return grid if right else None


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
