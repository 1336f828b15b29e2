"""The sequences of a batch, each on its own: the rows that are kept of it lie side by side among packed rows."""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.liveness.head import version_of
from lora_fx.liveness.padding import Rows, packed_rows, unpacked_rows

FEWEST_TOKENS = 8
"""How many tokens sequences must keep on the average for a call of its own for each to be worth it."""
_REMEMBERED = 8
"""How many tensors have their parts remembered for a batch: blocks share masks and positions."""
OF_ROWS, OF_ALL, BATCH, TOKENS, OTHER = "rows", "all", "batch", "tokens", ""
"""What an operand is: packed rows; the same for all sequences; or else what each dimension of it is."""


@dataclass(frozen=True, slots=True)
class Operand:
    """How an operand is parted among sequences."""

    dims: str | tuple[str, ...]
    """OF_ROWS, OF_ALL, or BATCH, TOKENS or OTHER for each dimension."""
    is_mask: bool = False
    """Whether it is nothing but a mask of attention, and may be left out where it forbids and adds nothing."""


@dataclass(frozen=True, slots=True)
class One:
    """One sequence: `length` rows are kept of it, from `first` on, or at these `positions`."""

    number: int
    length: int
    first: int
    positions: Tensor | None
    batch: int = 1

    def of(self, whole: Tensor, dims: Sequence[str]) -> Tensor:
        """Return what belongs to the sequence and to the rows that are kept of it."""
        for dim, what in enumerate(dims):
            if what == BATCH:
                whole = whole.narrow(dim, self.number, 1)
            elif what == TOKENS and self.positions is None:
                whole = whole.narrow(dim, self.first, self.length)
            elif what == TOKENS:
                whole = whole.index_select(dim, self.positions)  # type: ignore[arg-type]
        return whole


@dataclass(slots=True)
class Sequences:
    """The sequences of a batch of which rows are kept."""

    each: tuple[One, ...]
    _parts: dict[tuple[object, ...], tuple[Tensor, list[Any]]] = field(default_factory=dict)

    def parts(self, given: Any, operand: Operand) -> Sequence[Any]:
        """Return an operand's part for each sequence, those of rows and of what trains differentiable."""
        if operand.dims == OF_ALL:
            return [given] * len(self.each)
        if operand.dims == OF_ROWS:
            return given.split_with_sizes([one.length for one in self.each], 1)  # type: ignore[no-any-return]
        if given.requires_grad:
            return [one.of(given, operand.dims) for one in self.each]
        key = (given.data_ptr(), given.shape, given.stride(), given.dtype, version_of(given), operand)
        known = self._parts.get(key)
        if known is None:
            parts = [one.of(given, operand.dims) for one in self.each]
            # the tensor is held, so that its memory is nobody else's as long as it is known by its address
            known = self._parts[key] = given, [_as_mask(part) for part in parts] if operand.is_mask else parts
            for oldest in list(self._parts)[:-_REMEMBERED]:
                self._parts.pop(oldest, None)
        return known[1]


_CAUSAL = object()
"""Stands for the mask that allows each query the keys up to its own."""


def _as_mask(mask: Tensor) -> Any:
    """Return a mask as `attended` takes it: None where it allows all and adds nothing, _CAUSAL where it is that."""
    if bool(mask.all()) if mask.dtype is torch.bool else not bool(mask.any()):
        return None
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return mask
    ones = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device)
    if mask.dtype is torch.bool:
        return _CAUSAL if bool((mask == ones.tril()).all()) else mask
    low = torch.finfo(mask.dtype).min / 2  # what is lower has a weight of exactly 0: each query may see itself
    causal = torch.where(ones.tril(), mask == 0, mask <= low)
    return _CAUSAL if bool(causal.all()) else mask


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    """Return torch's attention, of all sequences or of one; stands in graphs of sequences."""
    if attn_mask is _CAUSAL:
        attn_mask, is_causal = None, True
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)


_SEQUENCES: "weakref.WeakKeyDictionary[Rows, Sequences | None]" = weakref.WeakKeyDictionary()


def sequences_of(rows: Rows) -> Sequences | None:
    """Return the sequences of a batch; None where one call for all of them serves better.

    So it is where they are short, and on devices other than processors, where calls cost more than copies.
    """
    if rows not in _SEQUENCES:
        worth = rows.index.device.type == "cpu" and rows.count >= FEWEST_TOKENS * rows.batch
        _SEQUENCES[rows] = Sequences(_each(rows)) if worth else None
    return _SEQUENCES[rows]


def _each(rows: Rows) -> tuple[One, ...]:
    found = []
    for number, kept in enumerate(~rows.dead):
        positions = kept.nonzero().flatten()
        length = positions.shape[0]
        if length:
            first = int(positions[0])
            in_one_run = int(positions[-1]) - first + 1 == length
            found.append(One(number, length, first, None if in_one_run else positions))
    return tuple(found)


def apart(function: Callable[..., Tensor], operands: tuple[Operand, ...]) -> Callable[..., Tensor]:
    """Return a function of rows and operands: what `function` gives of each sequence on its own, as packed rows.

    Args:
        function: called with (what has the sizes `batch` and `length`, operands), of all sequences or of one.
        operands: what each of them is.
    """

    def of_sequences(rows: Rows, *given: Any) -> Tensor:
        sequences = sequences_of(rows)
        if sequences is None:
            whole = [
                unpacked_rows(x, rows) if own.dims == OF_ROWS else x for x, own in zip(given, operands, strict=True)
            ]
            return packed_rows(function(rows, *whole), rows)
        parted = [sequences.parts(x, own) for x, own in zip(given, operands, strict=True)]
        results = [function(one, *parts) for one, *parts in zip(sequences.each, *parted, strict=True)]
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    of_sequences.treats_sequences = True  # type: ignore[attr-defined]  # by which passes know it
    return of_sequences


def treats_sequences(function: object) -> bool:
    """Whether a function is one that `apart` has made."""
    return getattr(function, "treats_sequences", False) is True


def of_no_module(compiled: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return the function of a graph that reads no module."""
    return functools.partial(compiled, None)
