"""What a block that ran on the rows of real tokens returns: those rows, and a way to the others for whoever asks.

Between blocks and after them, operations that treat rows apart run on the packed rows; choices among rows that are all
real give them; a product with a mask that is 0 at all padding is known there without computing it.  Everything else
meets all rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.capture.calls.ambient import AmbientState, RandomState, ambient_state
from lora_fx.liveness.padding import Rows, packed_rows, unpacked_rows
from lora_fx.liveness.rows import LazyRows, is_adopted, lazy
from lora_fx.liveness.sources import RowSource
from lora_fx.models.torch_internals import pytree
from lora_fx.passes.rowwise import ENTRY_BY_ENTRY
from lora_fx.regions.remaking import Remaking, Results, check_unchanged, remade
from lora_fx.regions.rowfunctions import HAVE_WEIGHTS, is_all, keeps_rows, row_function


class PackedRows(RowSource):
    """Rows [1, N, features] of the real tokens, shown as [batch, tokens, features].

    Rows of padding are computed where they are asked for, by making the calls of the blocks again on all rows.
    """

    def __init__(self, packed: Tensor, call: Remaking, leaf: int) -> None:
        self.packed = packed
        self.call = call
        self.leaf = leaf
        rows = call.rows
        self.shape = torch.Size((rows.batch, rows.length, packed.shape[-1]))
        self.dtype, self.device = packed.dtype, packed.device
        self.inputs = (packed,)
        self._filled: Tensor | None = None

    def take(self, rows: Tensor) -> Tensor:
        """Return rows by their numbers: those at hand, unless one of them is padding."""
        places = self.call.rows.places[rows]
        if bool((places < 0).any()):
            return self.whole().flatten(0, -2).index_select(0, rows)
        return self.packed[0].index_select(0, places)

    def whole(self) -> Tensor:
        """Return all rows; those of padding are computed now."""
        others = self.call.whole(self.leaf)
        return torch.where(self.call.rows.dead.unsqueeze(-1), others, unpacked_rows(self.packed, self.call.rows))

    def filled(self) -> Tensor:
        """Return the rows with zeros among them, for those who read no others; the same tensor each time."""
        if self._filled is None:
            self._filled = unpacked_rows(self.packed, self.call.rows)
        return self._filled

    def through(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return through(function, args, kwargs)

    def unreachable(self) -> Tensor | None:
        return self.call.rows.dead


def packed_in(value: Any) -> PackedRows | None:
    """Return the packed rows that a value stands for, if it does and nobody has asked for all of it."""
    if type(value) is not LazyRows or value.lazy_value.is_whole or is_adopted(value):
        return None
    source = value.lazy_value.source
    return source if isinstance(source, PackedRows) else None


def shown(packed: Tensor, call: Remaking, leaf: int) -> Tensor:
    """Return packed rows as a tensor of the shape that it has with all rows."""
    return lazy(PackedRows(packed, call, leaf))


def through(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what a torch function gives of packed rows, lazily or not; NotImplemented where it needs all rows."""
    name = row_function(func)
    if name == "getitem":
        return _chosen(*args) if len(args) == 2 else NotImplemented
    late = [packed for value in (*args, *kwargs.values()) if (packed := packed_in(value)) is not None]
    if not late or "out" in kwargs or kwargs.get("inplace"):
        return NotImplemented
    if any(packed.call.rows is not late[0].call.rows for packed in late):
        return NotImplemented
    if name == "dropout":
        return _dropped(late[0], *args, **kwargs) if type(args[0]) is LazyRows else NotImplemented
    if name in ("mul", "masked_fill"):
        known = _known_at_padding(func, name, args, kwargs)
        if known is not NotImplemented:
            return known
    if name in ("view", "reshape") and packed_in(args[0]) is not None:
        like = torch.empty(late[0].shape, dtype=late[0].dtype, device="meta")
        return args[0] if func(like, *args[1:], **kwargs).shape == like.shape else NotImplemented
    if not keeps_rows(name, args, kwargs) or (name not in ENTRY_BY_ENTRY and packed_in(args[0]) is None):
        return NotImplemented
    return _computed(func, args, kwargs, late[0].call.rows, name in HAVE_WEIGHTS)


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any], rows: Rows, has_weights: bool) -> Any:
    """Return the function's result on packed rows."""
    given = []
    for value in args:
        fit = _operand(value, rows, has_weights)
        if fit is NotImplemented:
            return NotImplemented
        given.append(fit)
    named = {name: _operand(value, rows, has_weights) for name, value in kwargs.items()}
    if any(value is NotImplemented for value in named.values()):
        return NotImplemented
    result = func(*given, **named)
    if given and result is given[0]:  # a cast to the dtype that it has
        return args[0]
    if not isinstance(result, Tensor) or result.shape[:-1] != (1, rows.count) or result.device != rows.index.device:
        return NotImplemented
    return shown(result, Operation(rows, func, args, kwargs), 0)


def _operand(value: Any, rows: Rows, has_weights: bool) -> Any:
    """Return an operand as it goes with packed rows; NotImplemented if it does not."""
    packed = packed_in(value)
    if packed is not None:
        value.lazy_value.note_taken()
        return packed.packed
    if not isinstance(value, Tensor) or (has_weights and type(value) is not LazyRows):
        return value
    if type(value) is LazyRows:
        return NotImplemented
    if value.dim() < 2 or (value.dim() <= 3 and all(size == 1 for size in value.shape[:-1])):
        return value
    return packed_rows(value, rows) if value.dim() == 3 and value.shape[:2] == rows.dead.shape else NotImplemented


def _known_at_padding(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return a product with what is 0 at padding, or what is filled there, as a plain tensor of all rows."""
    at = next((place for place, value in enumerate(args) if type(value) is LazyRows), None)
    packed = None if at is None else packed_in(args[at])
    if packed is None or kwargs or len(args) != (2 if name == "mul" else 3) or (name == "masked_fill" and at != 0):
        return NotImplemented
    other, rows = args[1 - at] if name == "mul" else args[1], packed.call.rows  # type: ignore[operator]
    if not isinstance(other, Tensor) or type(other) is LazyRows or other.dim() != 3 or other.requires_grad:
        return NotImplemented
    if other.shape[:2] != rows.dead.shape or other.shape[2] not in (1, packed.shape[2]):
        return NotImplemented
    at_padding = (other[..., :1] if other.stride(2) == 0 else other)[rows.dead]
    if bool((at_padding != 0).any() if name == "mul" else ~at_padding.all()):
        return NotImplemented
    given = list(args)
    args[at].lazy_value.note_taken()  # type: ignore[index]
    given[at] = unpacked_rows(packed.packed, rows)  # type: ignore[index]
    return func(*given)


def _chosen(value: Any, index: Any) -> Any:
    """Return rows that are chosen, as a plain tensor, where they are fewer than all and none is padding."""
    packed = packed_in(value)
    places = index if isinstance(index, tuple) else (index,)
    if packed is not None and len(places) <= 3 and all(is_all(place) for place in places):
        return value
    if packed is None or any(type(place) is LazyRows or place is None for place in places):
        return NotImplemented
    if len(places) == 3 and places[2] == slice(None):
        places = places[:2]
    if len(places) > 2 or Ellipsis in [place for place in places if not isinstance(place, Tensor)]:
        return NotImplemented
    rows = packed.call.rows
    numbers = torch.arange(rows.places.numel(), device=rows.places.device).view(rows.dead.shape)[places]
    at = rows.places[numbers]
    if numbers.numel() >= rows.places.numel() or bool((at < 0).any()):
        return NotImplemented
    value.lazy_value.note_taken()
    return packed.packed[0][at]


def _dropped(packed: PackedRows, rows: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if inplace:
        return NotImplemented
    if not training or p == 0:
        return rows
    rows.lazy_value.note_taken()
    operation = Operation(packed.call.rows, F.dropout, (rows, p, training), {}, draws=True)
    dropped = F.dropout(unpacked_rows(packed.packed, packed.call.rows), p, training)
    return shown(packed_rows(dropped, packed.call.rows), operation, 0)


class _Made:
    """Stands for packed rows among the arguments of an operation, without keeping them."""

    def __init__(self, rows: LazyRows) -> None:
        packed = packed_in(rows)
        assert packed is not None
        self.call, self.leaf = packed.call, packed.leaf


class Operation(Remaking):
    """A torch function of packed rows."""

    def __init__(self, rows: Rows, func: Any, args: Sequence[Any], kwargs: dict[str, Any], draws: bool = False) -> None:
        self.rows = rows
        self._function = func
        self._arguments = pytree.tree_map_only(LazyRows, _Made, (tuple(args), kwargs))
        self._ambient: AmbientState = ambient_state({rows.index.device})
        self._random = RandomState(self._ambient.devices) if draws else None
        leaves = pytree.tree_leaves(self._arguments)
        self._versions = [(value, value._version) for value in leaves if isinstance(value, Tensor)]

    def parents(self) -> tuple[Remaking, ...]:
        return tuple(value.call for value in pytree.tree_leaves(self._arguments) if isinstance(value, _Made))

    def again(self, made: Results) -> list[Any]:
        check_unchanged(all(value._version == version for value, version in self._versions))
        args, kwargs = pytree.tree_map_only(_Made, lambda value: made[value.call][value.leaf], self._arguments)
        with remade(self._ambient, self._random):
            return [self._function(*args, **kwargs)]
