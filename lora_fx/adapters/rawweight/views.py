"""Where the entries of a view of a weight come from: which of its dimensions are rows, columns, or members of a bank.

A weight is stored as [first, second…] or, for a bank of experts, as [bank, first, second].  A view operation is run on
a stub of the weight on the meta device; the strides of what comes out tell what each dimension steps over.  So every
view operation that torch has is understood, and none is listed.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["bank", "first", "second", "one", "repeat"]


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a view: `size` entries, `step` apart, of what `kind` says; "one" for a single entry."""

    kind: Kind
    size: int
    step: int


class WeightView:
    """A view of a stored weight; immutable."""

    def __init__(self, stub: Tensor, sizes: tuple[int, int, int], banked: bool) -> None:
        self.stub = stub
        """On the meta device, with the strides that the view has on the stored weight."""
        self.sizes = sizes
        """Members of the bank (1 for none), size of the first axis, of all further axes together."""
        self.banked = banked
        self.starts = _starts(int(stub.storage_offset()), sizes)
        """Where on each axis of the stored weight the view begins."""
        self.dims = _dims(stub, sizes, self.starts)
        """None where a dimension runs over several axes at once."""

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(shape: tuple[int, ...], banked: bool) -> "WeightView":
        """Return the view that shows the whole weight."""
        bank, rest = (shape[0], shape[1:]) if banked else (1, shape)
        stub = torch.empty(shape, device="meta")
        return WeightView(stub, (bank, rest[0], math.prod(rest[1:])), banked)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stub.shape)

    @property
    def is_whole(self) -> bool:
        """Whether it shows every entry in the stored order."""
        return self.stub.numel() == math.prod(self.sizes) and self.stub.is_contiguous()

    def through(self, view: Callable[[Tensor], Any]) -> Any:
        """Return what a view operation makes of it: a WeightView or a list of them; None if it is not such a view."""
        try:
            viewed = view(self.stub)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None
        if isinstance(viewed, Tensor):
            return self._known(viewed)
        views = [self._known(tensor) for tensor in viewed] if isinstance(viewed, (tuple, list)) else [None]
        return None if any(known is None for known in views) else views

    def _known(self, stub: Tensor) -> "WeightView | None":
        if stub.untyped_storage()._cdata != self.stub.untyped_storage()._cdata:
            return None
        view = WeightView(stub, self.sizes, self.banked)
        return None if view.dims is None else view

    @functools.lru_cache(maxsize=1024)  # noqa: B019  # few views, each asked for at every product
    def picked(self, number: int | None) -> "WeightView | None":
        """Return the view that shows members of the bank picked by an index: one (None), or `number` of them.

        None unless the bank is the first dimension, as a whole.
        """
        if not self.banked or self.dims is None or self.dims[0] != Dim("bank", self.sizes[0], 1):
            return None
        bank, first, second = 1 if number is None else number, *self.sizes[1:]
        root = torch.empty((bank, first, second), device="meta")
        sizes, strides = self.stub.shape[1:], self.stub.stride()[1:]
        offset = self.stub.storage_offset()
        if number is None:
            return WeightView(root.as_strided(sizes, strides, offset), (1, first, second), banked=False)
        stub = root.as_strided((number, *sizes), (first * second, *strides), offset)
        return WeightView(stub, (bank, first, second), banked=True)

    def two_sides(self) -> tuple[Kind, Kind] | None:
        """Return the kinds of the last two dimensions if they are rows and columns, either way round; else None.

        Before them at most the bank may stand, or a dimension over which one matrix is repeated.
        """
        if self.dims is None or len(self.dims) not in (2, 3):
            return None
        *before, left, right = (dim.kind for dim in self.dims)
        if before and before[0] not in ("bank", "one", "repeat"):
            return None
        if not {left, right} <= {"first", "second", "one"} or (left == right and left != "one"):
            return None
        return ("second", "first") if left == "second" or right == "first" else ("first", "second")


def _starts(offset: int, sizes: tuple[int, int, int]) -> dict[Kind, int]:
    _, first, second = sizes
    member, inside = divmod(offset, first * second) if first * second else (0, 0)
    return {"bank": member, "first": inside // second if second else 0, "second": inside % second if second else 0}


def _dims(stub: Tensor, sizes: tuple[int, int, int], starts: Mapping[Kind, int]) -> tuple[Dim, ...] | None:
    bank, first, second = sizes
    strides = {"bank": first * second, "first": second, "second": 1}
    lengths: dict[Any, int] = {"bank": bank, "first": first, "second": second}
    reached = dict(starts)
    dims = []
    for size, stride in zip(stub.shape, stub.stride(), strict=True):
        if size == 1 or stride == 0:
            dims.append(Dim("one" if size == 1 else "repeat", size, 1))
            continue
        kind: Any = next((k for k, unit in strides.items() if lengths[k] > 1 and unit and stride % unit == 0), None)
        if kind is None:
            return None
        step = stride // strides[kind]
        reached[kind] += step * (size - 1)
        if reached[kind] >= lengths[kind]:
            return None
        dims.append(Dim(kind, size, step))
    return tuple(dims)
