"""A weight W + scaling · B A that is never computed: products with it are the base's product plus a low-rank one.

Written for anything that computes like a tensor, so that the same lines run on tensors and write graphs.
Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3; what views and products do to it follows from W's own algebra.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lora_fx.adapters.rawweight.views import Dim, Extent, Kind, WeightView
from lora_fx.planning.sites import Layout

Operand = Any
"""A tensor, or a proxy that writes a graph."""


@dataclass(frozen=True)
class Factored:
    """The low-rank part of a weight: for the entries that `view` shows, scaling · `rows` · `columns`."""

    view: WeightView
    rows: Operand
    """[first, r], or [bank, first, r]."""
    columns: Operand
    """[r, second], or [bank, r, second]."""
    r: int
    scaling: float

    @staticmethod
    def of(view: WeightView, A: Operand, B: Operand, layout: Layout, r: int, scaling: float) -> Factored:
        """Return scaling · B A for a weight that is stored as B A, or, with the layout "in_out", transposed."""
        if layout == "in_out":
            A, B = B.transpose(-1, -2), A.transpose(-1, -2)
        return Factored(view, B, A, r, scaling)

    # -- views

    def through(self, operation: Callable[[Any], Any]) -> Any:
        """Return what a view operation makes of it: a Factored, a list of them, or None if it is not such a view."""
        viewed = self.view.through(operation)
        if isinstance(viewed, list):
            return [self._seen(view) for view in viewed]
        return None if viewed is None else self._seen(viewed)

    def _seen(self, view: WeightView) -> Factored:
        return Factored(view, self.rows, self.columns, self.r, self.scaling)

    def picked(self, index: Operand, number: int | None) -> Factored | None:
        """Return the members of the bank that an index picks: one if `number` is None."""
        view = self.view.picked(number)
        return None if view is None else Factored(view, self.rows[index], self.columns[index], self.r, self.scaling)

    # -- factors

    def _side(self, kind: Kind) -> Operand:
        """Return one factor for what the view shows: bank dimensions, then its own with r last; `columns`: r first."""
        factor, axis = (self.rows, -2) if kind == "first" else (self.columns, -1)
        banks = sum(dim.kind == "bank" for dim in self.view.dims or ())
        if self.view.banked:
            factor = _taken(factor, self.view.extent("bank"), 0, self.view.sizes[0])
        # with r behind it, or with r before it and no more dimensions after
        position = banks if axis == -2 else banks + 1
        return _taken(factor, self.view.extent(kind), position, self.view.sizes[1 if kind == "first" else 2])

    def matrices(self) -> tuple[Operand, Operand] | None:
        """Return (left, right) with view = scaling · left right, [.., a, r] and [.., r, b]; None if not a matrix."""
        kinds = self.view.two_sides()
        if kinds is None:
            return None
        left, right = self._matrix(kinds[0], -2), self._matrix(kinds[1], -1)
        if kinds[0] == "second":
            left, right = left.transpose(-1, -2), right.transpose(-1, -2)
        return left, right

    def _matrix(self, kind: Kind, position: int) -> Operand:
        """Return the factor of one side of a matrix view: [.., n, r] of rows, [.., r, n] of columns."""
        assert self.view.dims is not None
        side = self._side(kind)
        if self.view.dims[position].kind == "one":
            side = side.unsqueeze(-2 if kind == "first" else -1)
        if len(self.view.dims) == 3 and self.view.dims[0].kind == "one":
            side = side.unsqueeze(0)
        return side

    # -- products

    def linear(self, x: Operand) -> Operand | None:
        """Return x Wᵀ for a matrix view W [out, in]: scaling · (x rightᵀ) leftᵀ."""
        matrices = self.matrices()
        if matrices is None or len(self.view.shape) != 2:
            return None
        left, right = matrices
        return F.linear(F.linear(x, right) * self.scaling, left)

    def matmul(self, x: Operand) -> Operand | None:
        """Return x W."""
        matrices = self.matrices()
        return None if matrices is None else torch.matmul(torch.matmul(x, matrices[0]) * self.scaling, matrices[1])

    def rmatmul(self, x: Operand) -> Operand | None:
        """Return W x."""
        matrices = self.matrices()
        return None if matrices is None else torch.matmul(matrices[0], torch.matmul(matrices[1], x) * self.scaling)

    def grouped(self, x: Operand, offsets: Operand, product: Callable[..., Operand]) -> Operand | None:
        """Return each group of rows of x [S, in] times its member of the bank [E, in, out]."""
        matrices = self.matrices()
        if matrices is None or len(self.view.shape) != 3 or not self.view.banked:
            return None
        return product(product(x, matrices[0], offsets) * self.scaling, matrices[1], offsets)

    def embedding(self, ids: Operand, **options: Any) -> Operand | None:
        """Return the rows of W [n, dim] that the ids name."""
        matrices = self.matrices()
        if matrices is None or len(self.view.shape) != 2:
            return None
        return torch.matmul(F.embedding(ids, matrices[0], **options) * self.scaling, matrices[1])

    def convolution(self, x: Operand, convolve: Callable[..., Operand], groups: int, settings: Any) -> Operand | None:
        """Return the convolution of x with W [out, in / groups, kernel…]: one with A's r filters, then B's 1 · 1."""
        if not self.view.is_whole or self.view.banked:
            return None
        kernel = self.view.shape[1:]
        filters = self.columns.reshape(self.r, *kernel)
        if groups > 1:  # every group of channels meets the same r filters
            filters = filters.repeat(groups, *(1 for _ in kernel))
        inner = convolve(x, filters, None, *settings, groups) * self.scaling
        weight = self.rows.reshape(-1, self.r, *(1 for _ in kernel[1:]))
        return convolve(inner, weight, None, 1, 0, 1, groups)

    def einsum(self, equation: str, position: int, x: Operand) -> Operand | None:
        """Return the einsum of W (the operand at `position`) and x; None where it does not factor."""
        split = self._split(equation, position)
        if split is None:
            return None
        first, second, kinds = split
        inner = torch.einsum(first, x, self._side(kinds[0])) * self.scaling
        return torch.einsum(second, inner, self._side(kinds[1]))

    def _split(self, equation: str, position: int) -> tuple[str, str, tuple[Kind, Kind]] | None:
        """Return the equations of the two products that make up an einsum, and which factor each takes."""
        letters = _Letters.of(equation, position)
        assert self.view.dims is not None
        if letters is None or len(letters.weight) != len(self.view.dims):
            return None
        kinds = dict(zip(letters.weight, (dim.kind for dim in self.view.dims), strict=True))
        if set(kinds.values()) & {"one", "repeat"}:
            return None
        summed = {kinds[letter] for letter in letters.summed}
        if len(summed) != 1 or not summed <= {"first", "second"}:
            return None
        one = summed.pop()
        other: Kind = "second" if one == "first" else "first"
        banks = [x for x in kinds if kinds[x] == "bank"]
        sides = {kind: banks + [x for x in kinds if kinds[x] == kind] for kind in (one, other)}
        pair = letters.products(sides[one], sides[other])
        if pair is None:
            return None
        inner, rank = pair
        written = {kind: _factor_letters(kind, len(banks), sides[kind], rank) for kind in (one, other)}
        first, second = f"{letters.x},{written[one]}->{inner}", f"{inner},{written[other]}->{letters.result}"
        return first, second, (one, other)

    # -- as a whole

    def dense(self) -> Operand:
        """Return scaling · B A for the entries that the view shows."""
        assert self.view.dims is not None
        names = dict(zip(range(len(self.view.dims)), string.ascii_lowercase, strict=False))
        kinds = {name: self.view.dims[index].kind for index, name in names.items()}
        banks = [name for name in names.values() if kinds[name] == "bank"]
        rows, columns = (
            _factor_letters(kind, len(banks), banks + [name for name in names.values() if kinds[name] == kind], "z")
            for kind in ("first", "second")
        )
        whole = "".join(name for name in names.values() if kinds[name] in ("bank", "first", "second"))
        product = torch.einsum(f"{rows},{columns}->{whole}", self._side("first"), self._side("second"))
        return (product * self.scaling).reshape(_unexpanded(self.view.dims)).expand(self.view.shape)


def _factor_letters(kind: str, banks: int, letters: Sequence[str], rank: str) -> str:
    """Return the letters of one factor as `_side` gives it: the rank last with rows, before the columns."""
    if kind == "first":
        return "".join(letters) + rank
    return "".join(letters[:banks]) + rank + "".join(letters[banks:])


def _unexpanded(dims: Sequence[Dim]) -> tuple[int, ...]:
    return tuple(1 if dim.kind == "repeat" else dim.size for dim in dims)


def _taken(factor: Operand, extent: Extent, axis: int, length: int) -> Operand:
    """Return the entries of one axis that an extent names, with an axis for each of its dimensions (none: selected)."""
    if not extent.dims:
        return factor.select(axis, extent.start)
    sizes = [dim.size for dim in extent.dims]
    if _is_run(extent.dims):
        number = sizes[0] if len(sizes) == 1 else int(torch.Size(sizes).numel())
        part = factor if number == length else factor.narrow(axis, extent.start, number)
        return part if len(sizes) == 1 else part.unflatten(axis, sizes)
    indices = torch.tensor(extent.start)
    for dim in extent.dims:
        indices = indices.unsqueeze(-1) + torch.arange(dim.size) * dim.step
    taken = factor.index_select(axis, indices.reshape(-1).to(factor.device))
    return taken.unflatten(axis, sizes)


def _is_run(dims: Sequence[Dim]) -> bool:
    """Whether the dimensions run over neighbouring entries, in order."""
    step = 1
    for dim in reversed(dims):
        if dim.step != step:
            return False
        step *= dim.size
    return True


@dataclass(frozen=True, slots=True)
class _Letters:
    """The letters of an einsum of x and a weight."""

    x: str
    weight: str
    result: str

    @staticmethod
    def of(equation: str, position: int) -> _Letters | None:
        text = equation.replace(" ", "")
        sides, arrow, result = text.partition("->")
        operands = sides.split(",")
        if not arrow or len(operands) != 2 or "." in operands[position]:
            return None
        weight, x = operands[position], operands[1 - position]
        if any(len(set(side)) != len(side) for side in (weight, x.replace("...", ""), result.replace("...", ""))):
            return None
        return _Letters(x, weight, result)

    @property
    def summed(self) -> str:
        return "".join(letter for letter in self.weight if letter not in self.result)

    def products(self, one: Sequence[str], other: Sequence[str]) -> tuple[str, str] | None:
        """Return the letters of x times the factor that is summed over, and that of the rank; None without them."""
        if any(letter not in self.x for letter in self.summed) or any(letter not in self.result for letter in other):
            return None
        rank = next(letter for letter in string.ascii_letters if letter not in self.x + self.weight + self.result)
        plain = self.x.replace("...", "")
        dropped = [letter for letter in plain if letter not in self.result and letter not in self.weight]
        if dropped:  # summed over in x alone: let torch do it
            return None
        kept = [letter for letter in (*plain, *one) if letter not in self.summed]
        dots = "..." if "..." in self.x else ""
        return dots + "".join(dict.fromkeys(kept)) + rank, rank
