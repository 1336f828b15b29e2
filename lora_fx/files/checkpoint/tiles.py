"""The arithmetic of a streaming merge: a tile of a weight is read, changed, rounded once and written.

Tiles depend on shapes alone, so the result is the same whichever thread computes a tile, and when; all are as small as
the memory that they may take, and none is so narrow that a matrix product would sum in another order.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.adapters.factors.dora import stretch
from lora_fx.adapters.factors.lora import low_rank_weight
from lora_fx.files.checkpoint.plan import WeightFold
from lora_fx.files.checkpoint.rawbytes import RawBytes
from lora_fx.files.checkpoint.rounding import Noise, round_into

TILE = 1 << 18
"""Elements of a tile, and of the factors that it takes; with fewer of them threads wait for Python's lock."""
_WIDEST, _FEWEST_ROWS, _FEWEST_COLUMNS = 1 << 14, 32, 64


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of a matrix that is stored row by row."""

    rows: slice
    columns: slice
    width: int
    """Columns of the whole matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def elements(self) -> int:
        """Number of values in the tile."""
        return math.prod(self.shape)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield (first element in the matrix, first in the tile, number) for what lies in one piece in the file."""
        height, width = self.shape
        if width == self.width:
            yield self.rows.start * self.width, 0, height * width
            return
        for row in range(height):
            yield (self.rows.start + row) * self.width + self.columns.start, row * width, width


def tiles(rows: int, columns: int, rank: int) -> Iterator[Tile]:
    """Yield the tiles of a matrix, of nearly equal size: a small last one would be summed in another order."""
    if not rows * columns:
        return
    wide = min(columns, _WIDEST, max(_FEWEST_COLUMNS, TILE // rank))
    high = min(rows, max(1, TILE // wide), max(_FEWEST_ROWS, TILE // rank))
    high = max(high, min(rows, _FEWEST_ROWS))
    for some_rows in even(rows, high):
        for some_columns in even(columns, wide):
            yield Tile(some_rows, some_columns, columns)


def chunks(number: int) -> Iterator[Tile]:
    """Yield the tiles of a tensor whose shape does not matter: pieces of one long row."""
    for start in range(0, number, TILE):
        yield Tile(slice(0, 1), slice(start, min(start + TILE, number)), number)


def even(size: int, most: int) -> Iterator[slice]:
    """Yield parts of nearly equal size, none larger than the most."""
    number = -(-size // most)
    yield from (slice(size * i // number, size * (i + 1) // number) for i in range(number))


class Scratch:
    """Memory that one worker uses again and again; it grows to the largest tile and no further."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._taken: dict[str, tuple[int, torch.dtype, Tensor]] = {}
        """What each name was taken as last: mostly the same again, and cutting it takes time."""

    def take(self, name: str, number: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor of uninitialised values, valid until the name is taken again."""
        last = self._taken.get(name)
        if last is not None and last[:2] == (number, dtype):
            return last[2]
        size = number * dtype.itemsize
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = torch.empty(size, dtype=torch.uint8)
        taken = self._memory[name][:size].view(dtype)
        self._taken[name] = number, dtype, taken
        return taken


def bytes_of(flat: Tensor) -> memoryview:
    """Return the memory of a flat contiguous tensor."""
    return flat.view(torch.uint8).numpy().data


ReadTile = Callable[[Tile, Scratch], Tensor]
"""Returns a tile, flat."""


@dataclass(frozen=True, slots=True)
class OpenTensor:
    """Where a tensor lies in an open file."""

    file: RawBytes
    start: int
    dtype: torch.dtype

    def read(self, tile: Tile, scratch: Scratch) -> Tensor:
        """Return a tile, flat; it lives in the scratch memory."""
        flat = scratch.take("read", tile.elements, self.dtype)
        for part, position in self._parts(tile, flat):
            self.file.read_into(part, position)
        return flat

    def write(self, tile: Tile, flat: Tensor) -> None:
        for part, position in self._parts(tile, flat):
            self.file.write_from(part, position)

    def _parts(self, tile: Tile, flat: Tensor) -> Iterator[tuple[memoryview, int]]:
        """Yield what lies in one piece in the file, in memory, and its position there."""
        memory, size = bytes_of(flat), self.dtype.itemsize
        for element, first, number in tile.runs():
            yield memory[first * size : (first + number) * size], self.start + element * size


@dataclass(frozen=True, slots=True)
class Sums:
    """Scalar products over a tensor: of the base, of the delta, of the delta with what rounding left of it."""

    base: float = 0.0
    delta: float = 0.0
    survived: float = 0.0
    effect: float = 0.0
    """‖D X‖² on inputs that were held back, where codes are chosen by inputs."""
    missed: float = 0.0
    """‖(W' - W - D) X‖²."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.base + other.base,
            self.delta + other.delta,
            self.survived + other.survived,
            self.effect + other.effect,
            self.missed + other.missed,
        )


def fold_tile(
    fold: WeightFold,
    tile: Tile,
    source: OpenTensor,
    target: OpenTensor,
    noise: Noise | None,
    lengths: Tensor | None,
    scratch: Scratch,
) -> Sums:
    """Write one tile of W + Σ scaling · B A (DoRA: m · V / ‖V‖), rounded once; return what the report needs.

    Args:
        lengths: ‖V‖ of every output, where a tile does not hold whole ones; None lets the tile find them.

    Raises:
        OverflowError: a value is NaN or infinite.
    """
    stored, delta = source.read(tile, scratch), delta_of(fold, tile, scratch)
    written = stored if stored.dtype == target.dtype else scratch.take("written", tile.elements, target.dtype)
    base = scratch.take("base", tile.elements, torch.promote_types(delta.dtype, stored.dtype)).copy_(stored)
    delta = delta.to(base.dtype)
    merged = torch.add(base, delta, out=scratch.take("merged", tile.elements, base.dtype))
    if fold.magnitude is not None:
        set_lengths(fold, tile, merged.view(tile.shape), lengths)
        delta = torch.sub(merged, base, out=delta)
    _round(merged, tile, written, noise)
    change = merged.copy_(written).sub_(base)
    sums = Sums(float(torch.dot(base, base)), _square(fold, tile, delta), float(torch.dot(change, delta)))
    if not math.isfinite(sums.survived) and not bool(torch.isfinite(written).all()):
        raise OverflowError("the merged weight has NaN or infinite values")
    target.write(tile, written)
    return sums


def _square(fold: WeightFold, tile: Tile, delta: Tensor) -> float:
    """Return what a tile adds to ‖ΔW‖²; without DoRA the first adds all of it, in float64.

    ‖Σ scaling · B A‖² is Σ over pairs of scaling · scaling' · ⟨Bᵀ B', A A'ᵀ⟩.
    """
    if fold.magnitude is not None:
        return float(torch.dot(delta, delta))
    if (tile.rows.start, tile.columns.start) != (0, 0):
        return 0.0
    pairs = [(a, b) for a in fold.terms for b in fold.terms]
    inner = (_inner(a.left.t(), b.left.t()) * _inner(a.right, b.right) for a, b in pairs)
    return sum(a.scaling * b.scaling * float(both.sum()) for (a, b), both in zip(pairs, inner, strict=True))


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Return first @ secondᵀ in float64, a few columns at a time: a whole factor may be larger than a tile."""
    step = max(1, TILE // max(1, len(first), len(second)))
    starts = range(0, first.shape[1], step)
    products = (first[:, at : at + step].double() @ second[:, at : at + step].double().t() for at in starts)
    return sum(products, start=torch.zeros(len(first), len(second), dtype=torch.float64))


def delta_of(fold: WeightFold, tile: Tile, scratch: Scratch) -> Tensor:
    """Return Σ scaling · B A of a tile, flat, float32 or wider; it lives in the scratch memory.

    Two new tensors for each tile would take longer than the product.
    """
    if len(fold.terms) > 1:
        first, *others = (low_rank_weight(t.right[:, tile.columns], t.left[tile.rows], t.scaling) for t in fold.terms)
        return sum(others, start=first).view(-1)
    (term,) = fold.terms
    wide = torch.float64 if term.right.dtype == torch.float64 else torch.float32
    left, right = term.left[tile.rows].to(wide), term.right[:, tile.columns].to(wide)
    product = scratch.take("product", tile.elements, wide)
    exactly = _scales_exactly(term.scaling)
    product.view(tile.shape).addmm_(left, right, beta=0, alpha=term.scaling if exactly else 1)
    return product if exactly else product.mul_(term.scaling)


def _scales_exactly(scaling: float) -> bool:
    """Whether scaling · (B A) and (scaling · B) A have the same bits: where it is a power of two, as it mostly is."""
    return scaling >= 1 and math.frexp(scaling)[0] == 0.5


def set_lengths(fold: WeightFold, tile: Tile, merged: Tensor, lengths: Tensor | None) -> None:
    """Give every output of V its length m, in place."""
    assert fold.magnitude is not None
    outputs = _outputs(fold, tile)
    actual = torch.linalg.vector_norm(merged, dim=1) if lengths is None else lengths[outputs].to(merged.dtype)
    wanted = fold.magnitude[outputs].to(merged.dtype)
    scale = stretch(wanted, actual)
    merged.mul_(torch.where(wanted.isnan(), 1, scale).unsqueeze(1 if fold.outputs_first else 0))


def _outputs(fold: WeightFold, tile: Tile) -> slice:
    return tile.rows if fold.outputs_first else tile.columns


def needs_lengths(fold: WeightFold, tile: Tile) -> bool:
    """Whether the lengths of DoRA must be found before, since a tile does not hold whole outputs."""
    return fold.magnitude is not None and not (fold.outputs_first and tile.shape[1] == tile.width)


def lengths_of(fold: WeightFold, source: OpenTensor, scratch: Scratch) -> Tensor:
    """Return ‖W + scaling · B A‖ of every output, float64, in one pass over the weight."""
    squares = torch.zeros(fold.rows if fold.outputs_first else fold.columns, dtype=torch.float64)
    for tile in tiles(fold.rows, fold.columns, fold.rank):
        stored, delta = source.read(tile, scratch), delta_of(fold, tile, scratch)
        base = scratch.take("base", stored.numel(), torch.promote_types(delta.dtype, stored.dtype)).copy_(stored)
        merged = base.add_(delta).view(tile.shape)
        part = merged.square_().sum(dim=1 if fold.outputs_first else 0, dtype=torch.float64)
        squares[_outputs(fold, tile)] += part
    return squares.sqrt_()


def _rounded(wide: Tensor, tile: Tile, target: OpenTensor, noise: Noise | None, scratch: Scratch) -> Tensor:
    written = scratch.take("written", wide.numel(), target.dtype)
    _round(wide, tile, written, noise)
    return written


def _round(wide: Tensor, tile: Tile, written: Tensor, noise: Noise | None) -> None:
    """Round a tile, each of its runs with the noise of its place in the tensor."""
    if noise is None:  # a call for each row would take longer than what is computed
        written.copy_(wide)
        return
    for element, first, number in tile.runs():
        part = slice(first, first + number)
        round_into(wide[part], written[part], noise, element)


def cast_tile(read: ReadTile, tile: Tile, target: OpenTensor, noise: Noise | None, scratch: Scratch) -> None:
    """Write what is read of a tensor in the target's dtype, rounded once.

    Raises:
        OverflowError: a finite value is too large for the dtype.
    """
    values = read(tile, scratch)
    wide = torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else values.dtype
    exact = scratch.take("base", values.numel(), wide).copy_(values)
    written = _rounded(exact, tile, target, noise, scratch)
    if target.dtype.itemsize < exact.dtype.itemsize and bool((written.isinf() & ~exact.isinf()).any()):
        raise OverflowError(f"a value is too large for {str(target.dtype).removeprefix('torch.')}")
    target.write(tile, written)
