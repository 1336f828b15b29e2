"""A weight W + scaling · B A that is never computed: products with it are the base's product plus a low-rank one.

Written for anything that computes like a tensor, so that the same lines run on tensors and write graphs.
Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3; what views and products do to it follows from W's own algebra.
"""

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lora_fx.adapters.rawweight.views import Dim, Kind, WeightView
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
    def of(view: WeightView, A: Operand, B: Operand, layout: Layout, r: int, scaling: float) -> "Factored":
        """Return scaling · B A for a weight that is stored as B A, or, with the layout "in_out", transposed."""
        if layout == "in_out":
            A, B = B.transpose(-1, -2), A.transpose(-1, -2)
        return Factored(view, B, A, r, scaling)

    # -- views

    def through(self, operation: Callable[[Any], Any]) -> Any:
        """Return what a view operation makes of it: a Factored, a list of them, or None if it is not such a view."""
        viewed = self.view.through(operation)
        if isinstance(viewed, list):
            return [replace(self, view=view) for view in viewed]
        return None if viewed is None else replace(self, view=viewed)

    def picked(self, index: Operand, number: int | None) -> "Factored | None":
        """Return the members of the bank that an index picks: one if `number` is None."""
        view = self.view.picked(number)
        return None if view is None else replace(self, view=view, rows=self.rows[index], columns=self.columns[index])

    # -- factors

    def _side(self, kind: Kind) -> Operand:
        """Return one factor for what the view shows: bank dimensions, then its own with r last; `columns`: r first."""
        factor = self.rows if kind == "first" else self.columns
        banks = sum(dim.kind == "bank" for dim in self.view.dims or ())
        if self.view.banked:
            factor = self._taken(factor, "bank", 0)
        return self._taken(factor, kind, banks if kind == "first" else banks + 1)  # with r behind it, or before it

    def _taken(self, factor: Operand, kind: Kind, axis: int) -> Operand:
        """Return what a factor has for the view's dimensions of a kind, which run over the axis: an axis for each.

        Where there are none, one entry of the axis is selected.
        """
        start, dims = self.view.starts[kind], [dim for dim in self.view.dims or () if dim.kind == kind]
        if not dims:
            return factor.select(axis, start)
        sizes = [dim.size for dim in dims]
        if not _is_run(dims):
            indices = torch.tensor(start)
            for dim in dims:
                indices = indices.unsqueeze(-1) + torch.arange(dim.size) * dim.step
            return factor.index_select(axis, indices.reshape(-1).to(factor.device)).unflatten(axis, sizes)
        number = math.prod(sizes)
        whole = number == self.view.sizes[("bank", "first", "second").index(kind)]
        part = factor if whole else factor.narrow(axis, start, number)
        return part if len(sizes) == 1 else part.unflatten(axis, sizes)

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
        letters = _letters(equation, position)
        assert self.view.dims is not None
        if letters is None or len(letters[1]) != len(self.view.dims):
            return None
        x, weight, result = letters
        kinds = dict(zip(weight, (dim.kind for dim in self.view.dims), strict=True))
        summed = [letter for letter in weight if letter not in result]
        if set(kinds.values()) & {"one", "repeat"} or {kinds[letter] for letter in summed} not in _ONE_SIDE:
            return None
        plain = x.replace("...", "")
        if not set(summed) <= set(plain) or not set(plain) <= {*result, *weight}:
            return None  # the weight is summed by itself, or x is: let torch do it
        one = kinds[summed[0]]
        other: Kind = "second" if one == "first" else "first"
        banks = [letter for letter in kinds if kinds[letter] == "bank"]
        sides = {kind: banks + [letter for letter in kinds if kinds[letter] == kind] for kind in (one, other)}
        rank = next(letter for letter in string.ascii_letters if letter not in x + weight + result)
        written = {kind: _factor_letters(kind, len(banks), sides[kind], rank) for kind in (one, other)}
        kept = dict.fromkeys(letter for letter in (*plain, *sides[one]) if letter not in summed)
        inner = ("..." if "..." in x else "") + "".join(kept) + rank
        return f"{x},{written[one]}->{inner}", f"{inner},{written[other]}->{result}", (one, other)

    # -- as a whole

    def dense(self) -> Operand:
        """Return scaling · B A for the entries that the view shows."""
        assert self.view.dims is not None
        kinds = {name: dim.kind for name, dim in zip(string.ascii_lowercase, self.view.dims, strict=False)}
        banks = [name for name in kinds if kinds[name] == "bank"]
        rows, columns = (
            _factor_letters(kind, len(banks), banks + [name for name in kinds if kinds[name] == kind], "z")
            for kind in ("first", "second")
        )
        whole = "".join(name for name in kinds if kinds[name] in ("bank", "first", "second"))
        product = torch.einsum(f"{rows},{columns}->{whole}", self._side("first"), self._side("second"))
        unexpanded = [1 if dim.kind == "repeat" else dim.size for dim in self.view.dims]
        return (product * self.scaling).reshape(unexpanded).expand(self.view.shape)


def _factor_letters(kind: str, banks: int, letters: Sequence[str], rank: str) -> str:
    """Return the letters of one factor as `_side` gives it: the rank last with rows, before the columns."""
    if kind == "first":
        return "".join(letters) + rank
    return "".join(letters[:banks]) + rank + "".join(letters[banks:])


def _is_run(dims: Sequence[Dim]) -> bool:
    """Whether the dimensions run over neighbouring entries, in order."""
    step = 1
    for dim in reversed(dims):
        if dim.step != step:
            return False
        step *= dim.size
    return True


_ONE_SIDE = ({"first"}, {"second"})


def _letters(equation: str, position: int) -> tuple[str, str, str] | None:
    """Return the letters of x, of the weight (the operand at `position`) and of the result of an einsum of the two."""
    operands, arrow, result = equation.replace(" ", "").partition("->")
    sides = operands.split(",")
    if not arrow or len(sides) != 2 or "." in sides[position]:
        return None
    weight, x = sides[position], sides[1 - position]
    if any(len(set(side)) != len(side) for side in (weight, x.replace("...", ""), result.replace("...", ""))):
        return None
    return x, weight, result
