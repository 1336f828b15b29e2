"""What a module shows as its weight while an adapter is on it: W + scaling · B A, without computing it.

To its readers a LoRAWeight is a tensor.  Products with it become the base's product plus the low-rank one, so that
dropout reaches the other operand and no weight-sized tensor is made; views of it are LoRAWeights; every other function
gets the sum as a plain tensor.  What writes goes to the base weight: `weight.normal_()`, `weight.requires_grad = True`.
It has no memory of its own: a kernel that asks for its address gets an error, never the bare base weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.rawweight.factored import Factored
from lora_fx.adapters.rawweight.products import COPIES, GROUPED, VIEWS, Call, name_of, product
from lora_fx.adapters.rawweight.routed import routed_product, runs_of
from lora_fx.models.torch_internals import DisableTorchFunctionSubclass, tensor_without_memory


@dataclass(frozen=True)
class Part:
    """The two parts of an adapted weight, or of a view of it."""

    base: Tensor
    low: Factored
    dropout: Callable[[Tensor], Tensor] | None
    picked: bool = False
    """Whether it is a member of a bank that an index tensor has picked."""
    is_called: bool = False
    """Whether its owner adds the adapter to its own output: others read the weight, and seldom."""

    def dense(self) -> Tensor:
        """Return W + scaling · B A, a plain tensor in W's dtype, through which gradients reach the factors."""
        whole: Tensor = self.base + self.low.dense().to(self.base.dtype)
        return whole


class LoRAWeight(Tensor):
    """A view of W + scaling · B A that is not computed until somebody needs it as a whole."""

    part: Part

    @staticmethod
    def __new__(cls, part: Part) -> "LoRAWeight":
        low = part.low
        if torch.is_grad_enabled() and (low.rows.requires_grad or low.columns.requires_grad):
            shown: LoRAWeight = _Shown.apply(part, part.base, low.rows, low.columns)  # type: ignore[no-untyped-call]
        else:
            shown = _bare(cls, part.base)
        shown.part = part
        return shown

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if name_of(func) == "multi_head_attention_forward":
            return _attention_forward(*args, **(kwargs or {}))
        if any(kind not in _OWN for kind in types):  # another subclass of Tensor has its say in the base's product
            return _call(func, args, kwargs or {})
        with DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PLAIN:
            return func(*_mapped(args, lambda weight: _kept(weight).base), **(kwargs or {}))
        return func(*_mapped(args, _dense), **_mapped(kwargs or {}, _dense))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LoRAWeight({tuple(self.part.base.shape)}, r={self.part.low.r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _kept(self).dense().detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _kept(self).dense().detach()


_OWN = (LoRAWeight, Tensor, torch.nn.Parameter)
_PLAIN = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class _Shown(torch.autograd.Function):
    """Lets a gradient of the whole weight, should somebody compute one, reach the factors.

    Nothing is saved by way of autograd: a model that only asks a weight for its dtype saves as many tensors as its
    graph, which need not ask, and checkpointing compares the two numbers.
    """

    @staticmethod
    def forward(ctx: Any, part: Part, base: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.view, ctx.r, ctx.scaling = part.low.view, part.low.r, part.low.scaling
        ctx.factors = tuple((factor.detach(), factor._version) for factor in (rows, columns))
        return _bare(LoRAWeight, base)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if any(factor._version != version for factor, version in ctx.factors):
            raise RuntimeError("LoRA factors were changed in place after a weight was read that is differentiated now")
        with torch.enable_grad():
            rows, columns = (factor.detach().requires_grad_() for factor, _ in ctx.factors)
            dense = Factored(ctx.view, rows, columns, ctx.r, ctx.scaling).dense()
            gradients = torch.autograd.grad(dense, (rows, columns), gradient.to(dense.dtype))
        return None, gradient if ctx.needs_input_grad[1] else None, *gradients


def _bare(kind: type[LoRAWeight], base: Tensor) -> LoRAWeight:
    made: LoRAWeight = tensor_without_memory(
        kind, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
    )
    return made


def _kept(weight: LoRAWeight) -> Part:
    part: Part | None = weight.__dict__.get("part")
    if part is None:  # a tensor that autograd has saved and given back is another object
        raise RuntimeError("an adapted weight was taken out of torch's hands; read it from its module again")
    return part


# -- calls


def _attention_forward(*args: Any, **kwargs: Any) -> Any:
    """Return what `F.multi_head_attention_forward` returns; its linears see the weights as they are given.

    torch's function hands over to the first argument that is more than a tensor, before it does anything.  Here the
    same code runs with that question answered by no: the projections inside of it then meet the adapted weights one by
    one, as `F.linear` or as slices for q, k and v.
    """
    code = F.multi_head_attention_forward.__code__
    scope = {**vars(F), "has_torch_function": lambda _: False}
    own = FunctionType(code, scope, code.co_name, F.multi_head_attention_forward.__defaults__)
    return own(*args, **kwargs)


class _Address:
    """Stands for the address of an adapted weight: it tells how the base lies in memory, and nothing else.

    transformers asks it before it groups the products of experts, with torch up to 2.10.
    """

    def __init__(self, address: int) -> None:
        self._address = address

    def __mod__(self, size: int) -> int:
        return self._address % size

    def _refuse(self, *_: object) -> Any:
        raise RuntimeError("an adapted weight has no address: a kernel would read the base weight there")

    __index__ = __int__ = __bool__ = __eq__ = __hash__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __sub__ = _refuse


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weights = {id(tensor): tensor for tensor in _tensors((args, kwargs)) if isinstance(tensor, LoRAWeight)}
    if not weights:
        return func(*args, **kwargs)
    name = called_name(func)
    if name == "data_ptr":
        return _Address(_kept(args[0]).base.data_ptr())
    if args and id(args[0]) in weights and _is_for_base(name):
        return func(_kept(args[0]).base, *_mapped(args[1:], _dense), **_mapped(kwargs, _dense))
    if name in FACTS:
        return func(*_mapped(args, lambda value: _kept(value).base), **_mapped(kwargs, lambda value: _kept(value).base))
    if name == "is_leaf":
        return False  # an optimiser refuses it: what it would change is made at each read
    if name == "requires_grad":
        part = _kept(args[0])
        if part.is_called:  # a forward asks what its layer is like; an autograd function, what gradients it must make
            return part.base.requires_grad or (not torch.is_grad_enabled() and func(*args))
        return part.low.rows.requires_grad or part.low.columns.requires_grad
    for weight in weights.values():
        result = _product(name, func, args, kwargs, weight)
        if result is None and args and args[0] is weight:
            result = _view(name, func, args, kwargs, weight)
        if result is not None:
            return result
    return func(*_mapped(args, _dense), **_mapped(kwargs, _dense))


def _is_for_base(name: str) -> bool:
    """Whether a call writes to its first argument, or asks for what only a parameter has."""
    in_place = name.endswith("_") and not name.startswith("__")
    return in_place or name in _OF_PARAMETER


def _product(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weight: LoRAWeight) -> Tensor | None:
    """Return base product + low-rank product; None if the call does not multiply the weight, or not so simply."""
    part = _kept(weight)
    others = _mapped((args, kwargs), lambda other: other if other is weight else _kept(other).dense())
    call = Call(others[0], others[1], weight)
    routed = _routed(name, func, call, part)
    if routed is not None:
        return routed
    delta = product(name, call)
    if delta is None:
        return None
    low = delta(part.low, lambda x: _given(x, part))
    if low is None:
        return None
    args, kwargs = _mapped(others, lambda _: part.base)
    base = func(*args, **kwargs)
    result: Tensor = base + low.to(base.dtype)
    return result


def _routed(name: str, func: Any, call: Call, part: Part) -> Tensor | None:
    """Return the product of rows with the members of a bank that they are routed to; None if it is something else."""
    if (
        not (name in GROUPED or (name == "linear" and part.picked))
        or call.operand(1, "weight", "mat_b") is not call.weight
    ):
        return None
    x, bias = call.operand(0, "input", "mat_a"), call.operand(3 if name in GROUPED else 2, "bias")
    frozen = not part.base.requires_grad and (bias is None or not bias.requires_grad)
    plain = type(x) is Tensor and x.dim() > 1 and part.dropout is None
    if not (frozen and plain) or torch.is_autocast_enabled(x.device.type):
        return None
    args, kwargs = _mapped((call.args, call.kwargs), lambda _: part.base)
    runs = runs_of(name, call, part.low, x.shape[:-1].numel())
    weight = part.base.t() if name == "linear" else part.base
    return None if runs is None else routed_product(lambda: func(*args, **kwargs), runs, x, weight, part.low)


def _given(x: Tensor, part: Part) -> Tensor:
    """Return the other operand as the low-rank product gets it: after dropout, in the factors' dtype."""
    x = x if part.dropout is None else part.dropout(x)
    return x if x.dtype == part.low.rows.dtype or not x.is_floating_point() else x.to(part.low.rows.dtype)


def _view(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weight: LoRAWeight) -> Any:
    """Return the view of the weight that a call asks for, as a LoRAWeight or several; None if it asks for none."""
    part = _kept(weight)
    if name in COPIES:
        base = func(part.base, *_mapped(args[1:], _dense), **_mapped(kwargs, _dense))
        same_place = isinstance(base, Tensor) and base.device == part.base.device and base.is_floating_point()
        return LoRAWeight(replace(part, base=base)) if same_place else None
    if name not in VIEWS:
        return None
    if any(True for _ in _tensors((args[1:], kwargs))):
        return _picked(name, part, args)
    viewed = part.low.through(lambda stub: func(stub, *args[1:], **kwargs))
    if viewed is None:
        return None
    base = func(part.base, *args[1:], **kwargs)
    if isinstance(viewed, list):
        return tuple(LoRAWeight(replace(part, base=b, low=low)) for b, low in zip(base, viewed, strict=True))
    return LoRAWeight(replace(part, base=base, low=viewed))


def _picked(name: str, part: Part, args: tuple[Any, ...]) -> LoRAWeight | None:
    """Return the members of a bank that an index tensor names: `experts[ids]`."""
    index = args[1]
    if name != "__getitem__" or not isinstance(index, Tensor) or index.dim() > 1:
        return None
    if index.dtype not in (torch.int64, torch.int32):
        return None
    low = part.low.picked(index, None if index.dim() == 0 else index.shape[0])
    return None if low is None else LoRAWeight(replace(part, base=part.base[index], low=low, picked=True))


def called_name(func: Any) -> str:
    """Return a function's name; of a property its own, not that of its getter."""
    name = name_of(func)
    return name_of(func.__self__) if name == "__get__" else name


_OF_PARAMETER = frozenset({"__set__", "__setitem__", "data", "grad", "retain_grad", "register_hook"})
FACTS = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "size", "dim", "numel", "nelement", "stride", "storage_offset",
     "is_contiguous", "is_floating_point", "is_complex", "element_size", "__len__", "get_device", "is_cuda", "is_cpu",
     "is_meta", "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "names", "is_inference", "is_xpu",
     "is_mps", "is_conj", "is_neg", "result_type", "can_cast", "is_same_size", "is_signed", "itemsize"}
)  # fmt: skip
"""What depends on no value."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _mapped(value: Any, function: Callable[[LoRAWeight], Any]) -> Any:
    """Return the arguments with every LoRAWeight replaced."""
    if isinstance(value, LoRAWeight):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(inner, function) for inner in value)
    if type(value) is dict:
        return {key: _mapped(inner, function) for key, inner in value.items()}
    return value


def _dense(weight: LoRAWeight) -> Tensor:
    return _kept(weight).dense()
