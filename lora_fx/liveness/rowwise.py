"""The operations after which lazy rows are lazy: casts, scalars, a constant row, a softcap, and choices among rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_fx.liveness.rows import LazyRows, handles, lazy
from lora_fx.liveness.sources import Cast, Derived, Step
from lora_fx.models.torch_internals import pytree

_Functions = tuple[Callable[..., Any], ...]
_CASTS: _Functions = (Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double)
_TO: Callable[..., Any] = Tensor.to
_SCALED: _Functions = (Tensor.mul, Tensor.div, Tensor.true_divide, torch.mul, torch.div, torch.true_divide)
_ADDED: _Functions = (Tensor.add, torch.add, Tensor.sub, torch.sub)
_BENT: _Functions = (Tensor.tanh, torch.tanh)
_RESHAPED: _Functions = (
    Tensor.view,
    Tensor.reshape,
    Tensor.flatten,
    Tensor.unflatten,
    Tensor.squeeze,
    Tensor.unsqueeze,
)
_RESHAPED_BY_TORCH: _Functions = (torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze)


def install() -> None:
    """Let lazy tensors stay lazy through the operations of this module."""
    for function in (*_CASTS, _TO):
        handles(function)(_cast(function))
    for function in _SCALED:
        handles(function)(_by_number(function))
    for function in _ADDED:
        handles(function)(_by_row(function))
    for function in _BENT:
        handles(function)(_each_row(function))
    for function in (*_RESHAPED, *_RESHAPED_BY_TORCH, Tensor.contiguous):
        handles(function)(_reshaped(function))
    handles(Tensor.__getitem__)(_chosen)
    handles(Tensor.detach, torch.detach)(_detached)


def _derived(lazy_rows: LazyRows, shape: torch.Size, operation: Step, **facts: Any) -> LazyRows:
    value = lazy_rows.lazy_value
    cut = facts.pop("cut", False) or not torch.is_grad_enabled() or not lazy_rows.requires_grad
    return lazy(Derived(value, shape, operation, cut=cut, **facts))


def _cast(function: Callable[..., Any]) -> Callable[..., Any]:
    def handler(rows: LazyRows, *args: Any, **kwargs: Any) -> Any:
        if function is _TO and not _keeps_place(rows, args, kwargs):
            return NotImplemented
        if kwargs.keys() - {"dtype", "device", "non_blocking"}:
            return NotImplemented

        dtype = function(torch.empty(0, dtype=rows.dtype, device=rows.device), *args, **kwargs).dtype
        if dtype == rows.dtype:
            return rows
        step = Cast(dtype)
        return _derived(rows, rows.shape, step, step=step, dtype=dtype) if dtype.is_floating_point else NotImplemented

    return handler


def _keeps_place(rows: LazyRows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `to` asks for a dtype, or for the device where the tensor is."""
    given = [*args, *(kwargs[name] for name in ("dtype", "device") if name in kwargs)]
    for value in given:
        if isinstance(value, (str, torch.device)):
            if torch.device(value) != rows.device:
                return False
        elif not isinstance(value, torch.dtype):
            return False
    return len(args) <= 2


def _by_number(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def handler(rows: Any, *others: Any, **kwargs: Any) -> Any:
        if kwargs or len(others) != 1 or type(others[0]) not in (int, float):
            return NotImplemented
        return _stepped(rows, lambda tensor: function(tensor, others[0]))

    return handler


def _by_row(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def handler(rows: Any, *others: Any, **kwargs: Any) -> Any:
        if kwargs or len(others) != 1 or not isinstance(rows, LazyRows):
            return NotImplemented
        row = others[0]
        if type(row) in (int, float):
            return _stepped(rows, lambda tensor: function(tensor, row))
        if type(row) is not Tensor or row.requires_grad or row.device != rows.device:
            return NotImplemented
        fits = row.numel() == row.shape[-1] == rows.shape[-1] if row.dim() else False
        if not fits or row.dim() > rows.dim() or not row.is_contiguous() or row.dtype is not rows.dtype:
            return NotImplemented
        taken = row.clone().view(-1)  # what is written to it later, `row.data` and numpy's view too, is not meant
        return _stepped(rows, lambda tensor: function(tensor, taken))

    return handler


def _each_row(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def handler(rows: LazyRows, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else _stepped(rows, function)

    return handler


def _stepped(rows: LazyRows, step: Step) -> LazyRows:
    return _derived(rows, rows.shape, step, step=step)


def _reshaped(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a handler for what gives the rows another shape, or the same one."""

    def handler(rows: LazyRows, *args: Any, **kwargs: Any) -> Any:
        def operation(tensor: Tensor) -> Tensor:
            return function(tensor, *args, **kwargs)

        if any(isinstance(value, (Tensor, torch.dtype)) for value in (*args, *kwargs.values())):
            return NotImplemented
        like = operation(torch.empty(rows.shape, dtype=rows.dtype, device="meta"))
        if not like.dim() or like.shape[-1] != rows.shape[-1]:
            return NotImplemented
        # of rows that were chosen, it may be a copy
        chosen = any(isinstance(v.source, Derived) and v.source.rows is not None for v in rows.lazy_value.chain())
        return _derived(rows, like.shape, operation, copies=chosen)

    return handler


def _chosen(rows: LazyRows, index: Any) -> Any:
    """Index the row dimensions."""
    places = index if isinstance(index, tuple) else (index,)
    if not all(place is None or place is Ellipsis or type(place) in (int, bool, slice, Tensor) for place in places):
        return NotImplemented
    dims = len(rows.shape) - 1
    used = sum(_dimensions(place) for place in places)
    if Ellipsis in [place for place in places if place is Ellipsis]:
        at = next(number for number, place in enumerate(places) if place is Ellipsis)
        if any(place is Ellipsis for place in places[at + 1 :]) or used > dims + 1:
            return NotImplemented
        places = (*places[:at], *[slice(None)] * (dims + 1 - used), *places[at + 1 :])
        used = dims + 1
    if used > dims + 1:
        return NotImplemented
    if used == dims + 1:
        last = places[-1]
        if not (isinstance(last, slice) and last == slice(None)):
            return NotImplemented
        places = places[:-1]
    numbers = torch.arange(rows.shape[:-1].numel(), device=rows.device).view(rows.shape[:-1])
    numbers = numbers[places] if places else numbers
    copies = any(isinstance(place, Tensor) for place in places)
    shape = torch.Size((*numbers.shape, rows.shape[-1]))
    taken = pytree.tree_map_only(Tensor, Tensor.clone, index)  # what is written to it later is not meant
    return _derived(rows, shape, lambda tensor: tensor[taken], rows=numbers, copies=copies)


def _dimensions(place: Any) -> int:
    """Return how many dimensions one place of an index is for."""
    if place is None or place is Ellipsis or isinstance(place, bool):
        return 0 if place is not True and place is not False else 99  # a bool adds a dimension and chooses in it
    return place.dim() if isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) else 1


def _detached(rows: LazyRows) -> LazyRows:
    return _derived(rows, rows.shape, Tensor.detach, cut=True)
