"""Which parameters of a model multiply activations, seen in a real run, whatever code computes the product.

A dispatch mode sees every kernel that runs and what memory it is given.  From strides and offsets of the operand it
tells which axis of the parameter is summed over, so which are its inputs.
"""

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lora_fx.adapters.rawweight.products import name_of
from lora_fx.errors import RefusedError
from lora_fx.models.tensors import dotted
from lora_fx.models.torch_internals import DispatchMode
from lora_fx.models.walking import all_parameters_of, named_modules_of
from lora_fx.planning.sites import Layout


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
    flat: bool = False
    """Whether all axes of the parameter but the first are one side of a matrix."""


@dataclass(frozen=True, slots=True)
class Uses:
    """What a run has shown."""

    calls: dict[str, int]
    """How often the forward called each module."""
    weights: dict[str, WeightUse]
    """By the dotted name of the parameter; of one with several, the one whose module was being called."""
    complete: bool = True
    """Whether a run has shown it, so that what is not there is not used."""
    looked_at: frozenset[str] = frozenset()
    """Raw parameters whose use is known without a run, though not all that is there was seen."""


NOTHING_SHOWN = Uses({}, {}, complete=False)


@dataclass(slots=True)
class _Tally:
    """Uses of one parameter, being collected."""

    ops: Counter[str] = field(default_factory=Counter)
    sides: Counter[tuple[Layout, bool]] = field(default_factory=Counter)
    """How the parameter holds its matrix, and whether that is flat."""
    calls: int = 0
    outside: bool = False
    problem: str = ""

    def use(self, banked: bool) -> WeightUse:
        op = self.ops.most_common(1)[0][0]
        layout, flat = self.sides.most_common(1)[0][0] if self.sides else ("out_in", False)
        both = len({flat for _, flat in self.sides}) > 1
        problem = self.problem or "it is used as a bank of matrices and as one matrix" * both
        op = "experts" if banked and not flat and op == "linear" else op
        return WeightUse(op, layout, self.calls, self.outside, problem, flat)


def weight_uses(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Uses:
    """Return how one forward, in the modes that are set, uses the model's parameters; the model stays unchanged.

    Raises:
        Exception: whatever the model raises for the arguments.
    """
    calls: dict[str, int] = {}
    watch = _Watch(model)
    with _module_stack(model, calls, watch.active), _unfused(), watch.functions, watch:
        model(*args, **kwargs)
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in all_parameters_of(model):
        first.setdefault(id(parameter), (name, parameter))
    banks = {name for name, parameter in first.values() if parameter.dim() == 3}
    return Uses(calls, {name: seen.use(name in banks) for name, seen in watch.seen.items()})


_SWITCHING = threading.RLock()


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer from handing all of its weights to one kernel: one thread at a time.

    The switch is the process's: two threads at once would leave it as the other had set it.
    """
    with _SWITCHING:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _module_stack(model: nn.Module, calls: dict[str, int], active: list[nn.Module]) -> Iterator[None]:
    """Count calls, and keep the modules that are being called in `active`."""

    def enter(path: str, module: nn.Module, _args: object) -> None:
        calls[path] = calls.get(path, 0) + 1
        active.append(module)

    def leave(module: nn.Module, _args: object, _result: object) -> None:
        if active and active[-1] is module:
            active.pop()

    with contextlib.ExitStack() as hooks:
        for path, module in named_modules_of(model):
            hooks.enter_context(module.register_forward_pre_hook(functools.partial(enter, path)))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


class _Functions(TorchFunctionMode):
    """Remembers which torch function runs: F.linear and @ end in the same kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self.name = self.name, self.name or name_of(func)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name = outer


_Axes = frozenset[int]


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a tensor shows of a parameter."""

    owners: dict[str, nn.Module]
    """Its names, each with the module that owns it there."""
    rank: int
    """Number of its dimensions."""
    axes: tuple[_Axes, ...]
    """The axes of the parameter that each dimension of the tensor runs over."""


@dataclass(frozen=True, slots=True)
class _Memory:
    """What lies in the memory of a parameter, or of a copy of one."""

    shown: tuple[_Origin, ...]
    """One parameter, or each of those that it was computed from."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    alive: StorageWeakRef | None = None
    """Of a copy: its memory, which may go to another tensor later."""

    def seen_by(self, tensor: Tensor) -> tuple[_Origin, ...]:
        """Return what a tensor on this memory shows."""
        steps = [self._along(*step) for step in zip(tensor.shape, tensor.stride(), strict=True)]
        return tuple(
            replace(origin, axes=tuple(frozenset[int]().union(*(origin.axes[i] for i in step)) for step in steps))
            for origin in self.shown
        )

    def _along(self, size: int, stride: int) -> list[int]:
        """Return the dimensions whose index changes in so many steps of one stride."""
        dims = enumerate(zip(self.shape, self.strides, strict=True))
        return [i for i, (n, own) in dims if n > 1 and stride * (size - 1) >= own and stride % (own * n)]


class _Watch(DispatchMode):
    """Sees kernels, and knows which of their operands are (views or copies of) parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active: list[nn.Module] = []
        self.functions = _Functions()
        self.seen: dict[str, _Tally] = {}
        self._roots: dict[int | None, _Memory] = {}
        """The parameters, by memory."""
        self._copies: dict[int | None, _Memory] = {}
        self._buffers = set(map(_storage, model.buffers())) - {None}
        for path, module in named_modules_of(model):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() >= 1 and (storage := _storage(parameter)) is not None:
                    axes = tuple(frozenset((axis,)) for axis in range(parameter.dim()))
                    whole = _Memory((_Origin({}, parameter.dim(), axes),), tuple(parameter.shape), parameter.stride())
                    memory = self._roots.setdefault(storage, whole)
                    memory.shown[0].owners[dotted(path, name)] = module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = _kernel_of(func)
        if written := _written(func):
            self._refuse_writes(func, args, written)
        result = func(*args, **(kwargs or {}))
        operands = []
        for value in args:
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, Tensor):
                    operands.append(part)
        if name in _KERNELS or any(map(self._memory, operands)):
            self._note(name, args, operands, result)
        return result

    def _refuse_writes(self, func: Any, args: Any, written: tuple[int, ...]) -> None:
        """Stop before a kernel writes to a parameter: the memory is that of the caller's model."""
        for place in () if name_of(func) == "embedding_renorm_" else written:  # max_norm is refused where it counts
            tensor = args[place] if place < len(args) else None
            memory = self._roots.get(_storage(tensor)) if isinstance(tensor, Tensor) else None
            if memory is not None:
                names = [(name, f"{name_of(func)} in place") for name in memory.shown[0].owners]
                raise RefusedError(
                    "the forward writes to its own parameters, which an adapted model shares with yours",
                    names,
                    "let it write to buffers, or set what makes it write (RWKV: rescale_every=0)",
                )

    def _note(self, name: str, args: Any, operands: list[Tensor], result: Any) -> None:
        if name in _PRODUCTS:
            self._note_product(name, args)
        elif name in _KERNELS:
            for value in operands:
                for origin in self._where(value) if value.dim() >= 2 else ():
                    self._see(origin, "other", None, f"torch.{name} is one kernel; nothing can be added inside of it")
        elif name in _COPIES and isinstance(result, Tensor):
            self._note_copy(name, args, result)
        elif name in _ARITHMETIC and isinstance(result, Tensor):
            place = args[1] if name == "stack" and len(args) > 1 else 0
            self._note_computed(operands, result, place % result.dim() if name == "stack" else None)

    # -- where a tensor comes from

    def _memory(self, tensor: Tensor) -> _Memory | None:
        """Return what lies in the tensor's memory; None if nothing of a parameter does."""
        storage = _storage(tensor)
        return self._roots.get(storage) or self._copies.get(storage)

    def _where(self, tensor: Tensor) -> tuple[_Origin, ...]:
        """Return what the tensor shows of parameters; nothing if it is not one and was not made of any."""
        memory = self._memory(tensor)
        if memory is None or (memory.alive is not None and memory.alive.expired()):  # type: ignore[no-untyped-call]
            return ()
        return memory.seen_by(tensor)

    def _note_copy(self, name: str, args: Any, result: Tensor) -> None:
        shown = self._where(args[0]) if isinstance(args[0], Tensor) else ()
        if name in ("index", "index_select"):
            index = args[1][0] if name == "index" else args[2]
            if not isinstance(index, Tensor) or (len(args[1]) if name == "index" else args[1] + 1) != 1:
                return
            shown = tuple(replace(origin, axes=(*origin.axes[:1] * index.dim(), *origin.axes[1:])) for origin in shown)
        self._remember(shown, result)

    def _note_computed(self, operands: list[Tensor], result: Tensor, new: int | None) -> None:
        """What is computed from weights, buffers and numbers alone is a weight; each axis stays where it was, but for a
        new one.
        """
        given = [tensor for tensor in operands if tensor.is_floating_point() and tensor.dim()]
        shown = [self._where(tensor) for tensor in given if _storage(tensor) not in self._buffers]
        if all(shown):
            unknown = (frozenset[int](),) * result.dim()
            origins = [origin for some in shown for origin in some]
            if new is not None:
                origins = [replace(o, axes=(*o.axes[:new], frozenset[int](), *o.axes[new:])) for o in origins]
            kept = (o if len(o.axes) == result.dim() else replace(o, axes=unknown) for o in origins)
            self._remember(tuple(kept), result)

    def _remember(self, shown: tuple[_Origin, ...], result: Tensor) -> None:
        storage = _storage(result)
        if not shown or storage is None or storage in self._roots:
            return
        if all(len(origin.axes) == result.dim() for origin in shown):
            alive = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
            self._copies[storage] = _Memory(shown, tuple(result.shape), result.stride(), alive)

    # -- products

    def _note_product(self, name: str, args: Any) -> None:
        left, right, kind = _PRODUCTS[name]
        if kind != "product":
            for origin in self._where(args[right]):
                self._note_layer(kind, origin, args)
            return
        weights = [self._where(args[left]), self._where(args[right])]
        if all(weights):  # of two parameters, the one that F.linear calls the weight is
            weights[0] = ()
        for shown, tensor, summed in zip(weights, (args[left], args[right]), (-1, -2), strict=True):
            for origin in shown:
                self._note_matrix(origin, 0 if tensor.dim() == 1 else summed)

    def _note_layer(self, kind: str, origin: _Origin, args: Any) -> None:
        if kind == "embedding":
            self._see(origin, "embedding", ("in_out", False))
        elif kind == "bag":
            self._see(origin, "embedding", ("in_out", False), "nn.EmbeddingBag sums inside of one kernel")
        elif args[6]:
            self._see(origin, "other", ("out_in", False), "a transposed convolution cannot be adapted")
        else:
            self._see(origin, f"conv{len(origin.axes) - 2}d", ("out_in", False))

    def _note_matrix(self, origin: _Origin, summed: int) -> None:
        op = "linear" if self.functions.name in ("linear", "multi_head_attention_forward", "") else "matmul"
        if origin.rank == 3 and self.functions.name != "einsum":
            op = "linear"  # a bank: `use` calls it experts
        kept = frozenset[int]().union(*origin.axes) - origin.axes[summed]
        self._see(origin, op, _sides(origin.rank, origin.axes[summed], kept))

    def _see(self, origin: _Origin, op: str, sides: tuple[Layout, bool] | None, problem: str = "") -> None:
        owners = origin.owners
        inside = [name for name, module in owners.items() if self.active and self.active[-1] is module]
        name = inside[0] if inside else next(iter(owners))
        seen = self.seen.setdefault(name, _Tally())
        seen.ops[op] += 1
        seen.calls += 1
        if sides is not None:
            seen.sides[sides] += 1
        seen.outside |= not inside
        seen.problem = seen.problem or problem


_kernel_of = functools.cache(name_of)


@functools.cache
def _written(func: Any) -> tuple[int, ...]:
    """Return the positions of the arguments that a kernel writes to."""
    arguments = func._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _sides(rank: int, summed: _Axes, kept: _Axes) -> tuple[Layout, bool] | None:
    """Return which way round a parameter holds its matrix, and whether flat, from the axes that a product sums over."""
    inner, outer = summed - {0}, kept - {0}
    if rank > 2 and inner and outer and inner.isdisjoint(outer):  # a bank, along the first axis
        return ("out_in" if max(inner) > max(outer) else "in_out"), False
    if summed and summed == inner:
        return "out_in", rank > 2
    return ("in_out", rank > 2) if summed == {0} else None


def _storage(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's memory; None where its entries do not lie there with strides."""
    try:
        return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
    except (NotImplementedError, RuntimeError):  # tensor subclasses without memory of their own
        return None


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
_ARITHMETIC = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "exp", "log", "sigmoid", "tanh", "softplus", "pow", "sqrt", "rsqrt",
     "abs", "sum", "mean", "var", "std", "norm", "linalg_vector_norm", "clamp", "clamp_min", "cat", "stack", "where",
     "tril", "triu", "masked_fill"}
)  # fmt: skip
"""What may be done to weights, and make weights, before something is multiplied by them."""
