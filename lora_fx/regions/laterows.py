"""Hidden states of which no row has been computed: what is done to rows apart is done to those that are asked for.

A last block gives such a tensor, where its result is likely to meet a loss (`labelling`).  A final norm, a residual
sum, a head or a cast is noted, and computed for the rows that somebody takes.  Whatever else meets it gets all rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.capture.calls.ambient import AmbientState, ambient_state
from lora_fx.liveness.asked import Asked, asked_of, asked_rows, is_most
from lora_fx.liveness.rows import LazyRows, is_adopted, lazy, take, whole
from lora_fx.liveness.sources import RowSource, leaves_of, written_since
from lora_fx.models.torch_internals import pytree
from lora_fx.regions.remaking import Unchanged, remade
from lora_fx.regions.rowfunctions import HAVE_WEIGHTS, is_all, keeps_rows, row_function

Made = dict["LateRows", Tensor]
"""What has been computed so far of the rows that are asked for."""


class LateRows(RowSource):
    """Rows of hidden states [batch, tokens, features], to be computed by `on`."""

    def on(self, asked: Asked, made: Made) -> Tensor:
        """Return the rows that are asked for, [1, N, features], computed once."""
        if self not in made:
            made[self] = self.computed(asked, made)
        return made[self]

    def computed(self, asked: Asked, made: Made) -> Tensor:
        """Return the rows that are asked for, [1, N, features]."""
        raise NotImplementedError

    def note_taken(self) -> None:
        """Note that rows of what this is made of are used."""

    def all_rows(self) -> Tensor:
        """Return all rows but those of padding, which are computed where they are asked for; the same each time."""
        raise NotImplementedError

    def take(self, rows: Tensor) -> Tensor:
        if is_most(rows, self.shape[:-1].numel()):
            return self.whole().flatten(0, 1).index_select(0, rows)
        asked = asked_of(rows, *self.shape[:2])
        self.note_taken()
        taken = self.on(asked, {})[0]
        index = asked.rows.index
        if rows.shape == index.shape and bool((rows == index).all()):
            return taken
        return taken.index_select(0, asked.rows.places[rows])

    def through(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return through(function, args, kwargs)


def late_in(value: Any) -> LateRows | None:
    """Return the late rows that a value stands for, if it does and nobody has asked for all of it."""
    if type(value) is not LazyRows or value.lazy_value.is_whole or is_adopted(value):
        return None
    source = value.lazy_value.source
    return source if isinstance(source, LateRows) else None


def through(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what a torch function gives of late rows, late too; NotImplemented where it needs all rows."""
    name = row_function(func)
    if name == "getitem":
        return _chosen(*args) if len(args) == 2 else NotImplemented
    values = [value for value in (*args, *kwargs.values()) if type(value) is LazyRows]
    first = next(late for value in values if (late := late_in(value)) is not None)
    if "out" in kwargs or kwargs.get("inplace") or any(value.shape[:-1] != first.shape[:-1] for value in values):
        return NotImplemented
    if name == "dropout":
        off = _argument(args, kwargs, 2, "training", True) is False or _argument(args, kwargs, 1, "p", 0.5) == 0
        return args[0] if off and type(args[0]) is LazyRows else NotImplemented
    if name in ("view", "reshape") and type(args[0]) is LazyRows:
        like = torch.empty(args[0].shape, device="meta")
        return args[0] if func(like, *args[1:], **kwargs).shape == like.shape else NotImplemented
    if not keeps_rows(name, args, kwargs) or (name in HAVE_WEIGHTS and type(args[0]) is not LazyRows):
        return NotImplemented
    return _noted(func, args, kwargs, first)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _noted(func: Any, args: Sequence[Any], kwargs: dict[str, Any], first: LateRows) -> Any:
    """Return the function's result as late rows, if one row of nothing shows that it is one."""
    weights = _has_weights(func)
    others = [
        v for place, v in enumerate((*args, *kwargs.values())) if isinstance(v, Tensor) and not (weights and place)
    ]
    if not all(type(value) is LazyRows or _fits(value, first.shape) for value in others):
        return NotImplemented
    operation = RowOperation(func, args, kwargs, first.shape, weights)
    empty = asked_of(torch.zeros(0, dtype=torch.int64, device=first.device), *first.shape[:2])
    with torch.no_grad():
        like = operation.applied(_row_like, empty)
    if not isinstance(like, Tensor) or like.dim() != 3 or like.shape[:2] != (1, 1) or like.device != first.device:
        return NotImplemented
    operation.shape = torch.Size((*first.shape[:2], like.shape[2]))
    operation.dtype = like.dtype
    return lazy(operation)


def _all_of(value: LazyRows) -> Tensor:
    late = late_in(value)
    return value if late is None else late.all_rows()


def _has_weights(function: Any) -> bool:
    """Whether all tensors but the first are the same for all rows."""
    return row_function(function) in HAVE_WEIGHTS


def _row_like(value: LazyRows) -> Tensor:
    return torch.zeros((1, 1, value.shape[-1]), dtype=value.dtype, device=value.device)


def _fits(value: Tensor, shape: torch.Size) -> bool:
    """Whether a plain operand is the same for all rows, or has rows of its own."""
    if value.dim() < 2 or (value.dim() <= 3 and all(size == 1 for size in value.shape[:-1])):
        return True
    return value.dim() == 3 and value.shape[:2] == shape[:2]


def _chosen(value: Any, index: Any) -> Any:
    """Return rows that are chosen one by one as a plain tensor: whoever does so has chosen for good."""
    late, places = late_in(value), index if isinstance(index, tuple) else (index,)
    if late is not None and len(places) <= 3 and all(is_all(place) for place in places):
        return value
    if late is None or any(type(place) is LazyRows or place is None for place in places):
        return NotImplemented
    if len(places) == 3 and is_all(places[2]):
        places = places[:2]
    if len(places) > 2 or any(place is Ellipsis for place in places):
        return NotImplemented
    if not any(isinstance(place, (int, Tensor)) for place in places):
        return NotImplemented
    numbers = torch.arange(late.shape[:2].numel(), device=late.device).view(late.shape[:2])[places]
    if numbers.numel() >= late.shape[:2].numel():
        return NotImplemented
    return take(value, numbers.reshape(-1)).view(*numbers.shape, late.shape[2])


class RowOperation(LateRows):
    """A torch function of late rows."""

    def __init__(
        self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], shape: torch.Size, weights: bool
    ) -> None:
        self._function, self._arguments, self._weights = function, (tuple(args), dict(kwargs)), weights
        self._rows = shape[:2]
        leaves = [leaf for leaf in pytree.tree_leaves(self._arguments) if isinstance(leaf, Tensor)]
        self._late = [leaf for leaf in leaves if type(leaf) is LazyRows]
        plain = [leaf for leaf in leaves if type(leaf) is not LazyRows]
        self.device = self._late[0].device
        inputs = [*(tensor for leaf in self._late for tensor in leaves_of(leaf)), *plain]
        self.inputs = tuple({id(tensor): tensor for tensor in inputs if tensor.requires_grad}.values())
        self._ambient: AmbientState = ambient_state({self.device})
        self._unchanged = Unchanged(plain)
        self._versions = [
            (value, None if value.made is None else value.made._version)
            for leaf in self._late
            for value in leaf.lazy_value.chain()
        ]
        self._all: Tensor | None = None

    def applied(self, of_late: Any, asked: Asked) -> Any:
        """Return the function's result on the rows that are asked for, with what is given in the place of late rows."""

        def operand(value: Tensor) -> Tensor:
            if type(value) is LazyRows:
                return of_late(value)  # type: ignore[no-any-return]
            has_rows = not self._weights and value.dim() == 3 and value.shape[:2] == self._rows
            return asked_rows(value, asked) if has_rows and value.shape[:2] != (1, 1) else value

        args, kwargs = pytree.tree_map_only(Tensor, operand, self._arguments)
        return self._function(*args, **kwargs)

    def computed(self, asked: Asked, made: Made) -> Tensor:
        self._check()

        def of_late(value: LazyRows) -> Tensor:
            late = late_in(value)
            return take(value, asked.rows.index).unsqueeze(0) if late is None else late.on(asked, made)

        with remade(self._ambient, None):
            result: Tensor = self.applied(of_late, asked)
        return result

    def _check(self) -> None:
        """Hold that nobody has written to what it is made of.

        Raises:
            RefusedError: somebody has.
        """
        self._unchanged.check("rows")
        for value, version in self._versions:
            if value.made is not None and value.made._version != (value.version if version is None else version):
                raise written_since()

    def note_taken(self) -> None:
        for value in self._late:
            value.lazy_value.note_taken()
            late = late_in(value)
            if late is not None:
                late.note_taken()

    def all_rows(self) -> Tensor:
        if self._all is None:
            self._all = self._of(_all_of)
        return self._all

    def whole(self) -> Tensor:
        return self._of(whole)

    def _of(self, rows_of: Callable[[LazyRows], Tensor]) -> Tensor:
        """Return the function's result on all rows, as they are given of what is late."""
        self._check()
        args, kwargs = pytree.tree_map_only(LazyRows, rows_of, self._arguments)
        with remade(self._ambient, None):
            result: Tensor = self._function(*args, **kwargs)
        return result

    def unreachable(self) -> Tensor | None:
        found = [rows for value in self._late if (rows := value.lazy_value.source.unreachable()) is not None]
        return None if not found else torch.stack([rows.view(self._rows) for rows in found]).any(0)
