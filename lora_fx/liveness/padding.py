"""Which tokens are padding, as a mask says it, and tensors that hold the rows of the real ones only.

Token j of a sequence is padding where no query attends to it: nothing that it holds reaches another row.  A packed
tensor is [1, N, …] in the place of [B, T, …], the N real rows one after the other; as no dimension is missing, what
treats rows apart does the same to it.
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_LOW = -1000.0
"""What is added to scores and as low as this is meant to forbid."""
FEWEST = 0.1
"""The part of the rows that must be padding for packing to be worth its copies."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Rows:
    """Which rows of [batch, length] are kept: `index` [N] has their numbers; `dead` [batch, length] are the others."""

    index: Tensor
    dead: Tensor
    places: Tensor
    """[batch · length]: where each row is among those that are kept; -1 for those that are not."""
    _covered: "weakref.WeakKeyDictionary[Rows, bool]" = field(default_factory=weakref.WeakKeyDictionary)

    @property
    def batch(self) -> int:
        return self.dead.shape[0]

    @property
    def length(self) -> int:
        return self.dead.shape[1]

    @property
    def count(self) -> int:
        return self.index.shape[0]

    def drops_only_dead_of(self, other: "Rows | None") -> bool:
        """Whether all rows that are left out here are dead there too (None: nothing is)."""
        if other is None or other.dead.shape != self.dead.shape:
            return False
        if other is not self and other not in self._covered:
            self._covered[other] = not bool((self.dead & ~other.dead).any())
        return other is self or self._covered[other]


def packed_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return the kept rows of x [B, T, …] as [1, N, …]."""
    packed: Tensor = _Pack.apply(x, rows)  # type: ignore[no-untyped-call]
    return packed


def unpacked_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return x [1, N, …] as [B, T, …], with zeros in the place of what was left out."""
    unpacked: Tensor = _Unpack.apply(x, rows)  # type: ignore[no-untyped-call]
    return unpacked


def _pack(x: Tensor, rows: Rows) -> Tensor:
    if x.shape[:2] != rows.dead.shape:
        raise ValueError(f"rows of {tuple(rows.dead.shape)} cannot be taken out of {tuple(x.shape)}")
    if x.is_contiguous():
        return x.flatten(0, 1).index_select(0, rows.index).unsqueeze(0)
    batch, position = rows.index // rows.length, rows.index % rows.length
    return x[batch, position].unsqueeze(0)


def _unpack(x: Tensor, rows: Rows) -> Tensor:
    whole = x.new_zeros((rows.batch * rows.length, *x.shape[2:]))
    return whole.index_copy_(0, rows.index, x[0]).view(rows.batch, rows.length, *x.shape[2:])


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _pack(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return unpacked_rows(grad, ctx.rows), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _unpack(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return packed_rows(grad, ctx.rows), None


def rows_under(masks: Iterable[Tensor], batch: int, length: int) -> Rows | None:
    """Return the rows that are kept under masks of self-attention; None where next to nothing is padding.

    Args:
        masks: each […, queries or 1, keys], of bools that allow, or of numbers that are added to scores.
        batch: how many sequences there are.
        length: of each, in queries and in keys.
    """
    each = [dead_keys(mask, batch, length) for mask in masks]
    known = [dead for dead in each if dead is not None]
    if len(known) < len(each) or not known:
        return None
    dead = functools.reduce(torch.logical_and, known)
    if int(dead.sum()) < FEWEST * dead.numel():
        return None
    return rows_but(dead)


def rows_but(dead: Tensor) -> Rows:
    """Return the rows that are not dead."""
    kept = (~dead).flatten()
    index = kept.nonzero().flatten()
    places = torch.where(kept, kept.cumsum(0) - 1, -1)
    return Rows(index, dead, places)


def dead_keys(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """Return which keys [batch, length] no query attends to; None where the mask is none of self-attention.

    A key counts as dead only where its weight is exactly 0: a bool that is False, -inf, or the least number of a dtype.
    A query that may attend to nothing attends to all keys alike where scores are added to, so a sequence that has one
    which is not itself dead keeps all its rows.
    """
    if mask.dim() < 2 or mask.dim() > 4 or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
        return None
    if mask.dim() == 4 and mask.shape[0] not in (1, batch):
        return None
    allowed = mask if mask.dtype is torch.bool else _allowed(mask)
    if allowed is None:
        return None
    allowed = allowed[(None,) * (4 - allowed.dim())]
    some = allowed.any(1)  # of the heads
    dead = ~some.any(1).expand(batch, length)
    helpless = ~allowed.any(-1).all(1).expand(batch, length)
    return dead & ~(helpless & ~dead).any(-1, keepdim=True)


def rows_attended(masks: Iterable[Tensor], batch: int, length: int) -> Rows | None:
    """Return the rows of another sequence that attention to it may read, under its masks; None where that is not known.

    Args:
        masks: each […, queries or 1, keys], as for `rows_under`.
        batch: how many sequences there are.
        length: of each, in keys.
    """
    each = [forbidden_keys(mask, batch, length) for mask in masks]
    known = [forbidden for forbidden in each if forbidden is not None]
    return rows_but(functools.reduce(torch.logical_and, known)) if known and len(known) == len(each) else None


def forbidden_keys(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """Return which keys [batch, length] no query of another sequence attends to; None where the mask is none of such.

    As for `dead_keys`, weights must be exactly 0, and a sequence in which a query may attend to nothing keeps all.
    """
    if not 2 <= mask.dim() <= 4 or mask.shape[-1] != length or (mask.dim() == 4 and mask.shape[0] not in (1, batch)):
        return None
    allowed = mask if mask.dtype is torch.bool else _allowed(mask)
    if allowed is None:
        return None
    allowed = allowed[(None,) * (4 - allowed.dim())]
    forbidden = ~allowed.flatten(1, 2).any(1) & allowed.any(-1).flatten(1).all(1, keepdim=True)
    return forbidden.expand(batch, length)


def soft_minimum(masks: Iterable[Tensor]) -> float | None:
    """Return the least number in masks that is low as for padding, and yet not so low that a weight must be 0."""
    lowest = [float(mask.min()) for mask in masks if mask.is_floating_point() and mask.numel() and _is_soft(mask)]
    return min(lowest, default=None)


def _is_soft(mask: Tensor) -> bool:
    return bool(torch.finfo(mask.dtype).min / 2 < mask.min() <= _LOW)


def _allowed(mask: Tensor) -> Tensor | None:
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else None


@dataclass(slots=True)
class Remembered:
    """What was found out of tensors, until they change or are gone."""

    _known: dict[tuple[int, ...], tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], Any]] = field(
        default_factory=dict
    )

    def of(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], find: Callable[[], Any]) -> Any:
        """Return what `find` returns, or has returned for the same sizes and the very same tensors and values."""
        key, versions = (*map(id, tensors), *sizes), tuple(tensor._version for tensor in tensors)
        known = self._known.get(key)
        if known is not None and known[1] == versions and all(
            ref() is tensor for ref, tensor in zip(known[0], tensors, strict=True)
        ):  # fmt: skip
            return known[2]
        found = find()
        gone = [key for key, (refs, _, _) in self._known.items() if any(ref() is None for ref in refs)]
        for stale in gone:
            del self._known[stale]
        self._known[key] = (tuple(map(weakref.ref, tensors)), versions, found)
        return found
