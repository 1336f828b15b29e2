"""Which parameters of a model multiply activations, seen in a real run, whoever wrote the product and wherever.

A dispatch mode sees every kernel that runs and what memory it is given.  From strides and offsets of the operand it
tells which axis of the parameter is summed over, so which are its inputs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_fx.adapters.products import name_of
from lora_fx.adapters.views import Kind, WeightView
from lora_fx.capture.torch_internals import DispatchMode, FunctionMode
from lora_fx.sites import Layout


@dataclass(frozen=True, slots=True)
class WeightUse:
    """How one forward uses one parameter."""

    op: str
    """linear, matmul, experts, embedding, conv1d…, or other."""
    layout: Layout
    calls: int
    outside: bool
    """Whether code reads it while the module that owns it is not being called."""
    problem: str = ""
    """Why no adapter can take part in this use."""


@dataclass(slots=True)
class Uses:
    """What a run has shown."""

    calls: dict[str, int]
    """How often the forward called each module."""
    weights: dict[str, WeightUse]
    """By the dotted name of the parameter; of one with several, the one whose module was being called."""
    complete: bool = True
    """Whether a run has shown it, so that what is not there is not used."""


@dataclass(slots=True)
class _Seen:
    """Uses of one parameter, being collected."""

    ops: Counter[str] = field(default_factory=Counter)
    layouts: Counter[Layout] = field(default_factory=Counter)
    calls: int = 0
    outside: bool = False
    problem: str = ""

    def use(self, banked: bool) -> WeightUse:
        op = self.ops.most_common(1)[0][0]
        layout: Layout = self.layouts.most_common(1)[0][0] if self.layouts else "out_in"
        return WeightUse("experts" if banked and op == "linear" else op, layout, self.calls, self.outside, self.problem)


def weight_uses(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Uses:
    """Return how one forward, in the modes that are set, uses the model's parameters; the model stays unchanged.

    Raises:
        Exception: whatever the model raises for the arguments.
    """
    calls: dict[str, int] = {}
    watch = _Watch(model)
    with _module_stack(model, calls, watch.active), _unfused(), watch.functions, watch:
        model(*args, **kwargs)
    banks = {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
    return Uses(calls, {name: seen.use(name in banks) for name, seen in watch.seen.items()})


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer from handing all of its weights to one kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _module_stack(model: nn.Module, calls: dict[str, int], active: list[nn.Module]) -> Iterator[None]:
    """Count calls, and keep the modules that are being called in `active`."""
    hooks = []
    for path, module in model.named_modules():

        def enter(module: nn.Module, _args: object, path: str = path) -> None:
            calls[path] = calls.get(path, 0) + 1
            active.append(module)

        def leave(module: nn.Module, _args: object, _result: object) -> None:
            if active and active[-1] is module:
                active.pop()

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Functions(FunctionMode):
    """Remembers which torch function runs: F.linear and @ end in the same kernel."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.name = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self.name = self.name, self.name or name_of(func)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name = outer


_Where = tuple[dict[str, nn.Module], WeightView]
"""Names of a parameter, each with the module that owns it there, and what of it a tensor shows."""


class _Watch(DispatchMode):
    """Sees kernels, and knows which of their operands are (views or copies of) parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active: list[nn.Module] = []
        self.functions = _Functions()
        self.seen: dict[str, _Seen] = {}
        self._roots: dict[int, tuple[dict[str, nn.Module], Tensor]] = {}
        """By memory: every name of the parameter with the module that owns it there, and the parameter."""
        self._copies: dict[int, tuple[StorageWeakRef, dict[str, nn.Module], WeightView, tuple[int, ...]]] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 1 and _has_storage(parameter):
                    owners, _ = self._roots.setdefault(_storage(parameter), ({}, parameter))
                    owners[f"{path}.{name}".lstrip(".")] = module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = name_of(func)
        operands = [each for each in args if isinstance(each, Tensor)]
        if any(self._is_weight(each) for each in operands) or name in _KERNELS:
            self._note(name, args, operands, result)
        return result

    def _note(self, name: str, args: Any, operands: list[Tensor], result: Any) -> None:
        if name in _PRODUCTS:
            self._note_product(name, args)
        elif name in _KERNELS:
            for each in (*operands, *(t for a in args if isinstance(a, (list, tuple)) for t in a)):
                found = self._where(each) if isinstance(each, Tensor) and each.dim() >= 2 else None
                if found is not None:
                    self._see(found[0], "other", None, f"torch.{name} is one kernel; nothing can be added inside of it")
        elif name in _COPIES and isinstance(result, Tensor):
            self._note_copy(name, args, result)

    # -- where a tensor comes from

    def _is_weight(self, tensor: Tensor) -> bool:
        return _has_storage(tensor) and (_storage(tensor) in self._roots or _storage(tensor) in self._copies)

    def _where(self, tensor: Tensor) -> _Where | None:
        """Return the parameter that the tensor shows, and what of it; None if it is none or shows it strangely."""
        if not _has_storage(tensor):
            return None
        key = _storage(tensor)
        if key in self._roots:
            owners, root = self._roots[key]
            return None if not root.is_contiguous() else _seen_as(owners, root, tensor)
        if key in self._copies and not self._copies[key][0].expired():  # type: ignore[no-untyped-call]
            _, owners, view, strides = self._copies[key]
            order = _order(tensor, view.shape, strides)
            moved = None if order is None else view.through(lambda stub: stub.permute(order))
            return None if moved is None else (owners, moved)
        return None

    def _note_copy(self, name: str, args: Any, result: Tensor) -> None:
        found = self._where(args[0]) if isinstance(args[0], Tensor) else None
        if found is None or not _has_storage(result):
            return
        view: WeightView | None = found[1]
        if name in ("index", "index_select"):
            index = args[1][0] if name == "index" else args[2]
            leading = len(args[1]) == 1 if name == "index" else args[1] == 0
            usable = leading and isinstance(index, Tensor) and index.dim() <= 1 and index.dtype != torch.bool
            view = found[1].picked(None if index.dim() == 0 else index.numel()) if usable else None
        if view is not None and view.shape == tuple(result.shape):
            alive = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
            entry = (alive, found[0], view, result.stride())
            self._copies[_storage(result)] = entry

    # -- products

    def _note_product(self, name: str, args: Any) -> None:
        left, right, kind = _PRODUCTS[name]
        if kind != "product":
            found = self._where(args[right])
            if found is not None:
                self._note_layer(kind, found, args)
            return
        weights = [self._where(args[left]), self._where(args[right])]
        if all(weights):  # of two parameters, the one that F.linear calls the weight is
            weights[0] = None
        for found, tensor, summed in zip(weights, (args[left], args[right]), (-1, -2), strict=True):
            if found is not None:
                self._note_matrix(found, tensor, 0 if tensor.dim() == 1 else summed)

    def _note_layer(self, kind: str, found: _Where, args: Any) -> None:
        owners, view = found
        if kind == "embedding":
            self._see(owners, "embedding", "in_out")
        elif kind == "bag":
            self._see(owners, "embedding", "in_out", "nn.EmbeddingBag sums inside of one kernel")
        else:
            dims = len(view.shape) - 2
            transposed = "a transposed convolution" if args[6] else ""
            op = f"conv{dims}d" if not transposed else "other"
            self._see(owners, op, "out_in", f"{transposed} cannot be adapted" if transposed else "")

    def _note_matrix(self, found: _Where, tensor: Tensor, summed: int) -> None:
        owners, view = found
        op = "linear" if self.functions.name in ("linear", "multi_head_attention_forward", "") else "matmul"
        kinds: list[Kind] = [dim.kind for dim in view.dims or ()]
        if view.banked and self.functions.name not in ("einsum",):
            op = "linear"  # a bank: `use` calls it experts
        if len(kinds) < 1 or kinds[summed] not in ("first", "second"):
            self._see(owners, op, None)
            return
        self._see(owners, op, "out_in" if kinds[summed] == "second" else "in_out")

    def _see(self, owners: dict[str, nn.Module], op: str, layout: Layout | None, problem: str = "") -> None:
        inside = [each for each, module in owners.items() if self.active and self.active[-1] is module]
        name = inside[0] if inside else next(iter(owners))
        seen = self.seen.setdefault(name, _Seen())
        seen.ops[op] += 1
        seen.calls += 1
        if layout is not None:
            seen.layouts[layout] += 1
        seen.outside |= not inside
        seen.problem = seen.problem or problem


def _has_storage(tensor: Tensor) -> bool:
    try:
        return tensor.layout == torch.strided and tensor.untyped_storage() is not None
    except (NotImplementedError, RuntimeError):  # tensor subclasses without memory of their own
        return False


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _seen_as(owners: dict[str, nn.Module], root: Tensor, tensor: Tensor) -> _Where | None:
    """Return the view of the root that a tensor on its memory is."""
    shape = tuple(root.shape)
    whole = WeightView.of(shape if len(shape) > 1 else (1, *shape), banked=len(shape) == 3)
    offset = tensor.storage_offset() - root.storage_offset()
    view = whole.through(lambda stub: stub.as_strided(tensor.shape, tensor.stride(), offset))
    return None if not isinstance(view, WeightView) else (owners, view)


def _order(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int] | None:
    """Return the permutation of a copy's dimensions that a view of it is; None if it is something else."""
    if tensor.storage_offset() or sorted(tensor.shape) != sorted(shape):
        return None
    left = list(range(len(shape)))
    order = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        match = next((i for i in left if shape[i] == size and (size == 1 or strides[i] == stride)), None)
        if match is None:
            return None
        left.remove(match)
        order.append(match)
    return order


_PRODUCTS: dict[str, tuple[int, int, str]] = {
    "mm": (0, 1, "product"),
    "bmm": (0, 1, "product"),
    "mv": (0, 1, "product"),
    "addmm": (1, 2, "product"),
    "_addmm_activation": (1, 2, "product"),
    "baddbmm": (1, 2, "product"),
    "addmv": (1, 2, "product"),
    "_grouped_mm": (0, 1, "product"),
    "grouped_mm_fallback": (0, 1, "product"),
    "convolution": (0, 1, "convolution"),
    "_convolution": (0, 1, "convolution"),
    "convolution_overrideable": (0, 1, "convolution"),
    "embedding": (1, 0, "embedding"),
    "_embedding_bag": (1, 0, "bag"),
    "_embedding_bag_forward_only": (1, 0, "bag"),
}
"""Positions of the two operands of each kernel; of a layer's, of its input and its weight."""
_KERNELS = frozenset(
    {"mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "_thnn_fused_lstm_cell", "miopen_rnn",
     "lstm_cell", "gru_cell", "_trilinear", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
)  # fmt: skip
_COPIES = frozenset({"_to_copy", "clone", "contiguous", "index", "index_select", "_reshape_copy"})
