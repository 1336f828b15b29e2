"""The arithmetic of a merge into codes: rows are read, changed, rounded onto the base's own grid and packed again.

Scales and zeros stay.  The nearest codes are taken, or, where the covariance of a layer's inputs is given, those that
GPTQ's order gives, if they are better on inputs that were not used for them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_fx.adapters.factors.rounding import Moment, Prepared, chosen_codes, prepared
from lora_fx.files.checkpoint.codes import CodedWeight, Located
from lora_fx.files.checkpoint.plan import CodeFold
from lora_fx.files.checkpoint.rawbytes import RawBytes
from lora_fx.files.checkpoint.tiles import OpenTensor, Scratch, Sums, Tile, delta_of, even, set_lengths
from lora_fx.files.fingerprint import sample_positions
from lora_fx.files.values import DTYPES
from lora_fx.models.grids import Grid

_AT_ONCE = 1 << 16
"""Elements of the weight that are computed at a time."""
_SHARE = 8
"""Of a moment's rows, how many of the weight are computed at a time where codes are chosen: column by column, which
takes as long for few rows as for many.
"""
Write = Callable[[Scratch], Sums | None]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight of codes, opened."""

    fold: CodeFold
    codes: OpenTensor
    scale: Tensor
    """[rows, parts of a row], in its own dtype."""
    zero: Tensor | None
    target: OpenTensor

    @property
    def coded(self) -> CodedWeight:
        return self.fold.coded

    def tiles(self) -> Iterator[Tile]:
        """Yield rows of the weight, so many as are computed at a time."""
        columns = self.coded.columns
        most = max(_AT_ONCE // columns, columns // _SHARE if self.fold.inputs is not None else 0, 1)
        for rows in even(self.coded.rows, most):
            yield Tile(rows, slice(0, columns), columns)

    def words(self, tile: Tile) -> Tile:
        """Return where the codes of these rows are stored."""
        width = self.coded.codes[1].shape[1]
        return Tile(tile.rows, slice(0, width), width)

    def grid(self, tile: Tile) -> Grid:
        scale = _spread(self.scale.float(), tile)
        zero = torch.zeros_like(scale) if self.zero is None else _spread(self.zero.float(), tile)
        low = -(1 << (self.coded.bits - 1))
        return Grid(scale.where(scale != 0, 1.0), zero, low, -low - 1)

    def read(self, tile: Tile, scratch: Scratch) -> Tensor:
        """Return the codes of these rows, as float32."""
        words = self.codes.read(self.words(tile), scratch)
        if not self.coded.packed:
            return words.view(tile.shape).float()
        return unpacked(words.view(tile.shape[0], -1), self.coded.bits)[:, : tile.width].float()

    def write(self, tile: Tile, codes: Tensor) -> None:
        codes = codes.to(torch.int8)
        words = packed(codes, self.coded.bits) if self.coded.packed else codes
        self.target.write(self.words(tile), words.reshape(-1))

    def values(self, grid: Grid, codes: Tensor) -> Tensor:
        """Return what codes stand for, float32, rounded as whoever reads the checkpoint rounds it."""
        return grid.values(codes).to(self.scale.dtype).float()


def writing(fold: CodeFold, opened: Callable[[Located], OpenTensor], target: OpenTensor) -> Iterator[tuple[int, Write]]:
    """Yield (bytes, what writes them) for the codes of a weight; guided ones are written by one call."""
    coded, weight = fold.coded, _opened(fold, opened, target)
    if fold.inputs is not None:
        yield coded.codes[1].end - coded.codes[1].start, partial(_fold_guided, weight, opened)
        return
    for tile in weight.tiles():
        yield weight.words(tile).elements * target.dtype.itemsize, partial(_fold_nearest, weight, tile)


def _opened(fold: CodeFold, opened: Callable[[Located], OpenTensor], target: OpenTensor) -> _Weight:
    coded, scratch = fold.coded, Scratch()
    scale = _whole(opened(coded.scale), coded.scale, scratch).clone()
    zero = None if coded.zero is None else _zeros(coded, _whole(opened(coded.zero), coded.zero, scratch).clone())
    return _Weight(fold, opened(coded.codes), scale.view(_by_rows(coded, scale)), zero, target)


def sampled(fold: CodeFold) -> list[float]:
    """Return the numbers of the base that `sample_values` looks at."""
    coded, scratch, found = fold.coded, Scratch(), []
    with contextlib.ExitStack() as files:

        def opened(located: Located) -> OpenTensor:
            file, entry = located
            raw = RawBytes(file.path, "r")
            files.callback(raw.close)
            return OpenTensor(raw, file.data_start + entry.start, DTYPES[entry.dtype])

        weight = _opened(fold, opened, opened(coded.codes))
        for row, column in (divmod(at, coded.columns) for at in sample_positions(coded.rows * coded.columns)):
            tile = Tile(slice(row, row + 1), slice(0, coded.columns), coded.columns)
            found.append(float(weight.values(weight.grid(tile), weight.read(tile, scratch))[0, column]))
    return found


def _by_rows(coded: CodedWeight, numbers: Tensor) -> tuple[int, int]:
    return (1, 1) if numbers.numel() == 1 else (coded.rows, numbers.numel() // coded.rows)


def _whole(opened: OpenTensor, located: Located, scratch: Scratch) -> Tensor:
    number = located[1].elements
    return opened.read(Tile(slice(0, 1), slice(0, number), number), scratch)


def _zeros(coded: CodedWeight, held: Tensor) -> Tensor:
    """Return the codes of 0, [rows, parts of a row]; packed ones lie below each other in a word."""
    if held.dtype == torch.int8:
        return held.view(_by_rows(coded, held))
    assert coded.zero is not None
    words = held.view(coded.zero[1].shape).t().contiguous()
    return unpacked(words, coded.bits).t()[: coded.rows]


def _spread(numbers: Tensor, tile: Tile) -> Tensor:
    rows = numbers if len(numbers) == 1 else numbers[tile.rows]
    return rows.repeat_interleave(tile.width // numbers.shape[1], 1).expand(tile.shape)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the codes, int8, that words of 32 bits [rows, words] hold, the first in the lowest bits."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), -1).flatten(1)
    return (octets.short() - (1 << (bits - 1))).to(torch.int8)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return the words of 32 bits that hold codes [rows, columns]; bits beyond the columns are 0."""
    octets = (codes.short() + (1 << (bits - 1))).to(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        octets = octets[:, 0::2] | octets[:, 1::2] << 4
    return octets.contiguous().view(torch.int32)


# -- rounding


def _goal(weight: _Weight, tile: Tile, grid: Grid, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the base's numbers, the merged ones, and by how much they differ: [rows, columns], float32.

    Raises:
        OverflowError: a value is NaN or infinite.
    """
    fold = weight.fold.fold
    base = weight.values(grid, weight.read(tile, scratch))
    goal = base + delta_of(fold, tile, scratch).view(tile.shape).float()
    if fold.magnitude is not None:
        set_lengths(fold, tile, goal, None)
    if not bool(torch.isfinite(goal).all()):
        raise OverflowError("the merged weight has NaN or infinite values")
    return base, goal, goal - base


def _summed(weight: _Weight, grid: Grid, codes: Tensor, base: Tensor, delta: Tensor) -> Sums:
    change = weight.values(grid, codes) - base
    return Sums(float(base.square().sum()), float(delta.square().sum()), float((change * delta).sum()))


def _fold_nearest(weight: _Weight, tile: Tile, scratch: Scratch) -> Sums:
    grid = weight.grid(tile)
    base, goal, delta = _goal(weight, tile, grid, scratch)
    codes = grid.nearest(goal)
    weight.write(tile, codes)
    return _summed(weight, grid, codes, base, delta)


def _fold_guided(weight: _Weight, opened: Callable[[Located], OpenTensor], scratch: Scratch) -> Sums:
    """Write the codes of GPTQ's order, or the nearest where these come nearer on inputs that are held back.

    Raises:
        OverflowError: a value is NaN or infinite; no inputs have such a covariance.
    """
    assert weight.fold.inputs is not None
    order = _prepared(_moment(weight, opened, weight.fold.inputs.rounding))
    held = _moment(weight, opened, weight.fold.inputs.held)
    guided, nearest = Sums(), Sums()
    for tile in weight.tiles():
        grid = weight.grid(tile)
        base, goal, delta = _goal(weight, tile, grid, scratch)
        near, codes = grid.nearest(goal), chosen_codes(goal, grid, order)
        weight.write(tile, codes)
        effect = held.square(delta)
        for_near = Sums(effect=effect, missed=held.square(grid.values(near) - goal))
        nearest += _summed(weight, grid, near, base, delta) + for_near
        guided += _summed(weight, grid, codes, base, delta)
        guided += Sums(effect=effect, missed=held.square(grid.values(codes) - goal))
    if guided.missed < nearest.missed:
        return guided
    for tile in weight.tiles():
        _fold_nearest(weight, tile, scratch)
    return nearest


def _moment(weight: _Weight, opened: Callable[[Located], OpenTensor], located: Located) -> Moment:
    """Read X Xᵀ [in, in]; the memory is its own."""
    size = weight.coded.columns
    total = _whole(opened(located), located, Scratch()).view(size, size)
    if not bool(torch.isfinite(total).all()):
        raise OverflowError("the covariance of its inputs has NaN or infinite values")
    return Moment(total, 1)


def _prepared(inputs: Moment) -> Prepared:
    try:
        return prepared(inputs)
    except ValueError as error:
        raise OverflowError("no inputs have the covariance that is given for it") from error
