"""A tensor whose rows are computed when they are asked for, and all of it where somebody asks for something else.

Whatever a caller does with it is right: an operation on rows gives such a tensor again (`rowwise`), a loss that is
known takes the rows that it needs, and anything else meets the whole value, which is computed once and is the tensor
from then on.  Code that does not ask torch's functions (C++, below an autograd function) meets the value as well, and
its gradients arrive: the tensor has an edge of its own in the graph of autograd.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_fx.errors import RefusedError
from lora_fx.liveness.sources import LazyValue, RowSource
from lora_fx.models.torch_internals import DisableTorchFunctionSubclass, pytree, tensor_without_memory

Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}
"""What is done for a torch function whose first argument is a lazy tensor; NotImplemented asks for the whole value."""

_GETTERS = (
    "shape dtype device layout ndim itemsize nbytes requires_grad is_leaf grad_fn output_nr is_cuda is_cpu is_meta "
    "is_mps is_xpu is_sparse is_sparse_csr is_quantized is_mkldnn is_nested"
)
_QUESTIONS = "dim size numel nelement __len__ is_floating_point is_complex element_size get_device is_inference"
_METADATA = {getattr(Tensor, name).__get__ for name in _GETTERS.split()}
_METADATA |= {getattr(Tensor, name) for name in _QUESTIONS.split()} | {
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""What is answered without a value."""
_OF_GRADIENTS = {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad}
"""What asks for the gradient of the tensor itself."""
_H = TypeVar("_H", bound=Handler)


def handles(*functions: Any) -> Callable[[_H], _H]:
    """Register a handler for torch functions."""

    def registered(handler: _H) -> _H:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return registered


class LazyRows(Tensor):
    """A tensor [*rows, features] of which nothing need have been computed; see `lazy`."""

    lazy_value: LazyValue
    lazy_adopted: Tensor | None = None

    @staticmethod
    def __new__(cls, value: LazyValue) -> "LazyRows":
        source = value.source
        made: LazyRows = tensor_without_memory(cls, source.shape, dtype=source.dtype, device=source.device)
        made.lazy_value = value
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            args, kwargs = pytree.tree_map_only(LazyRows, _known, (args, kwargs))
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if type(value) is LazyRows and not (value.lazy_value.is_whole or is_adopted(value)):
                result = value.lazy_value.source.through(func, args, kwargs)
                if result is not NotImplemented:
                    return result
        first = args[0] if args else None
        if func in HANDLERS and type(first) is LazyRows and not (first.lazy_value.is_whole or is_adopted(first)):
            result = HANDLERS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _OF_GRADIENTS:
            _check_gradients_pass((args, kwargs))
        args, kwargs = pytree.tree_map_only(LazyRows, whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = pytree.tree_map_only(LazyRows, _value, (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy(source: RowSource) -> LazyRows:
    """Return a tensor whose rows the source computes when they are asked for; it requires a gradient as `inputs` do."""
    return _lazy(LazyValue(source))


def _lazy(value: LazyValue) -> LazyRows:
    inputs = value.source.inputs
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        made: LazyRows = _Edge.apply(value, lambda: LazyRows(value), *inputs)  # type: ignore[no-untyped-call]
        return made
    return LazyRows(value)


def whole(rows: LazyRows) -> Tensor:
    """Return the tensor as a plain one with all its rows, differentiable; the same one each time."""
    if _is_written(rows):
        with DisableTorchFunctionSubclass():
            return rows.view_as(rows)
    if not is_adopted(rows):
        return rows.lazy_value.whole()
    if rows.lazy_adopted is None:
        rows.lazy_adopted = _Adopted.apply(rows)  # type: ignore[no-untyped-call]
    return rows.lazy_adopted


def is_adopted(rows: LazyRows) -> bool:
    """Whether a gradient is wanted of the tensor itself: an autograd function of somebody's has returned it."""
    with DisableTorchFunctionSubclass():
        wanted = rows.requires_grad
    return wanted and not any(tensor.requires_grad for tensor in rows.lazy_value.source.inputs)


def _is_written(rows: LazyRows) -> bool:
    """Whether an autograd function has said that it wrote to the tensor, whose history is its own from then on."""
    with DisableTorchFunctionSubclass():
        return not rows.is_inference() and rows._version > 0


def _known(rows: LazyRows) -> Tensor:
    """Return the tensor that answers questions about this one."""
    made = rows.lazy_value.made
    return rows if made is None or _is_written(rows) else made


def take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows of these numbers of a tensor, lazy or not, [len(rows), features], differentiable; None: all."""
    if type(tensor) is LazyRows:
        value = tensor.lazy_value
        return value.whole().flatten(0, -2) if rows is None else value.take(rows)
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if rows is None else flat.index_select(0, rows)


def _value(rows: LazyRows) -> Tensor:
    """Return the value below autograd, where no history can be made; the edge of the tensor stands for it."""
    value = rows.lazy_value
    if value.made is None:
        with torch.no_grad():
            plain = value.source.whole().detach()
        inputs = value.source.inputs
        with torch.inference_mode(False), torch.enable_grad():
            value.made = _Edge.apply(value, lambda: plain, *inputs) if inputs else plain  # type: ignore[no-untyped-call]
        value.version = value.made._version
    return value.whole().detach()


def _check_gradients_pass(arguments: Any) -> None:
    taken = [leaf for leaf in pytree.tree_leaves(arguments) if type(leaf) is LazyRows and leaf.lazy_value.taken]
    if taken:
        raise RefusedError(
            "the gradient of logits or hidden states is asked for, single rows of which have been used",
            advice='ask before the loss is computed, or apply without "loss" and "liveness" in `optimise`',
        )


class _Adopted(torch.autograd.Function):
    """The value of a tensor whose history is its own, and not that of what it is made of."""

    @staticmethod
    def forward(ctx: Any, rows: LazyRows) -> Tensor:
        return rows.lazy_value.whole().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Edge(torch.autograd.Function):
    """Where gradients of a value enter that has been computed without a history."""

    @staticmethod
    def forward(ctx: Any, value: LazyValue, make: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
        ctx.value, ctx.wanted = value, [tensor if tensor.requires_grad else None for tensor in inputs]
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        wanted = [tensor for tensor in ctx.wanted if tensor is not None]
        gradients = iter(ctx.value.source.passed_on(gradient, wanted, again))
        return (None, None, *(None if tensor is None else next(gradients) for tensor in ctx.wanted))
