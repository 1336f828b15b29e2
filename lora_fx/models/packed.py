"""Linears of quantisation libraries: codes and scales that only their own forward multiplies by.

Such a layer is run as it is, and its weight shows itself as a `PackedWeight`: a tensor of the shape of W that holds
nothing, and reads the layer when somebody asks for numbers.  What a library's layer holds is told by one `Packing`.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lora_fx.models.swap import original_class


@dataclass(frozen=True, slots=True)
class Packing:
    """How one class of layers holds its weight."""

    holds: str
    """The parameter with the codes."""
    problem: Callable[[Any], str]
    """Why the layer cannot be adapted as it is now; "" if it can."""
    dtype: Callable[[Any], torch.dtype | None]
    """Of the numbers that the codes stand for; None where the layer has lost it."""
    read: Callable[[Any], Tensor]
    """Returns these numbers, [out, in], a new tensor."""
    again: Callable[[Any, Tensor], nn.Module]
    """Returns a layer that holds other numbers, quantised with the settings of this one; this one stays unchanged."""
    copied: Callable[[Any], Iterator[tuple[object, object]]]
    """Yields each object of the layer that a copy shares or gets in another way, with what stands in the copy."""
    settle: Callable[[Any], None] = lambda _: None
    """Keeps a copy, in place, from what would spoil its training."""


class PackedWeight(Tensor):
    """The weight of a layer that holds codes: its shape and dtype, and the numbers when they are asked for.

    Any operation of torch's on it is one on its numbers.
    """

    _layer: nn.Module

    @staticmethod
    def __new__(cls, layer: nn.Module, dtype: torch.dtype | None = None) -> "PackedWeight":
        """Return the weight of a packed layer, in a dtype; None: in the layer's own, float32 where it has lost it."""
        packing, codes = _packing(layer), _codes(layer)
        shape = (layer.out_features, layer.in_features)
        made: PackedWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype or packing.dtype(layer) or torch.float32, device=codes.device
        )
        made._layer = layer
        return made

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """Return the numbers that the codes stand for."""
        with torch.no_grad():
            return _packing(self._layer).read(self._layer).to(self.dtype)

    def multiplied(self, x: Tensor) -> Tensor:
        """Return what the layer computes of x without its adapters: W x + b, by its own forward."""
        return own_forward(self._layer, x)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map_only(PackedWeight, PackedWeight.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight(of {original_class(self._layer).__name__}, {tuple(self.shape)}, {self.dtype})"


def is_packed(module: nn.Module) -> bool:
    """Whether the module is a linear that holds codes, whose forward is run as it is."""
    return _packing_of(original_class(module)) is not None


def is_packed_class(kind: type) -> bool:
    """Whether a class without swaps is of such linears."""
    return _packing_of(kind) is not None


def problem_of(module: nn.Module) -> str | None:
    """Return why a packed layer cannot be adapted as it is; None if it can."""
    if _codes_or_none(module) is None:
        return "it holds no codes yet"
    return _packing(module).problem(module) or None


def own_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a packed layer computes by the forward of its class."""
    kind: Any = original_class(layer)
    result: Tensor = kind.forward(layer, x)
    return result


def held_weight(owner: nn.Module, name: str) -> Tensor:
    """Return a parameter of the module as it is held, also where it is offloaded; of a packed layer a PackedWeight."""
    if name == "weight" and is_packed(owner):
        return PackedWeight(owner)
    weight = owner._parameters[name]
    assert weight is not None
    return weight


def copies_of_packed(module: nn.Module) -> Iterator[tuple[object, object]]:
    """Yield what a copy of a layer shares or gets in another way, if it is a packed one."""
    packing = _packing_of(original_class(module))
    if packing is not None and _codes_or_none(module) is not None:
        yield from packing.copied(module)


def settle_packed_(model: nn.Module) -> None:
    """Keep the packed layers of a copy from what would spoil its training, in place."""
    for module in model.modules():
        packing = _packing_of(original_class(module))
        if packing is not None:
            packing.settle(module)


def quantised_alike(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a packed layer with other numbers, quantised with the settings of this one, which stays unchanged."""
    return _packing(layer).again(layer, weight)


def make_plain_(layer: nn.Module, weight: Tensor) -> None:
    """Turn a packed layer without adapters into an nn.Linear with this weight, in place; its hooks and name stay."""
    bias = layer._parameters.get("bias")
    bias = bias if bias is not None else getattr(layer, "bias", None)
    plain = nn.Linear(layer.in_features, layer.out_features, False, device="meta")  # type: ignore[arg-type]
    kept = {name: value for name, value in vars(layer).items() if name in _OF_HOOKS or name == "training"}
    vars(plain).update(kept)
    layer.__class__ = nn.Linear
    vars(layer).clear()
    vars(layer).update(vars(plain))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)


_OF_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
             "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, layer) of every packed layer of a model."""
    return ((path, module) for path, module in model.named_modules() if is_packed(module))


def values_in(model: nn.Module) -> dict[int, int]:
    """Return how many values each parameter stands for, by its identity: those of W where it holds codes."""
    numbers = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for _, layer in packed_layers(model):
        if (codes := _codes_or_none(layer)) is not None:
            numbers[id(codes)] = int(layer.out_features) * int(layer.in_features)  # type: ignore[arg-type]
    return numbers


def _packing(layer: nn.Module) -> Packing:
    packing = _packing_of(original_class(layer))
    assert packing is not None
    return packing


def _codes(layer: nn.Module) -> Tensor:
    codes = _codes_or_none(layer)
    assert codes is not None
    return codes


def _codes_or_none(layer: nn.Module) -> Tensor | None:
    return layer._parameters.get(_packing(layer).holds)


@functools.cache
def _packing_of(kind: type) -> Packing | None:
    """Return how the layers of a class hold their weight, if it computes by the forward of a class that is known."""
    for base in kind.__mro__:
        packing = _KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if packing is not None:
            same: Any = getattr(kind, "forward", None), getattr(base, "forward", None)
            return packing if same[0] is same[1] else None
    return None


# -- bitsandbytes


def _functions() -> Any:
    """bitsandbytes' own functions: whoever has one of its layers has imported it."""
    return importlib.import_module("bitsandbytes.functional")


def _problem_4bit(layer: Any) -> str:
    weight, state = layer._parameters["weight"], _state_4bit(layer)
    if weight.is_meta:
        return "its codes are on the meta device: load the model onto the device on which it trains"
    if state is None:
        return "its weight is not quantised yet; move it to the device on which it trains before"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has repacked its weight for inference, through which no gradient passes; load it anew and "
            "adapt it before the first call in eval mode"
        )
    return ""


def _state_4bit(layer: Any) -> Any:
    return getattr(layer._parameters["weight"], "quant_state", None) or vars(layer).get("quant_state")


def _dtype_4bit(layer: Any) -> torch.dtype | None:
    return getattr(_state_4bit(layer), "dtype", None)


def _read_4bit(layer: Any) -> Tensor:
    state, codes = _state_4bit(layer), layer._parameters["weight"]
    numbers: Tensor = _functions().dequantize_4bit(codes.data.view(-1, 1), state)
    return numbers


def _again_4bit(layer: Any, weight: Tensor) -> nn.Module:
    state = _state_4bit(layer)
    made = _bare(layer)
    old = layer._parameters["weight"]
    made._parameters["weight"] = type(old)(
        weight.detach().to(state.dtype).contiguous(),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.dtype,
    ).to(weight.device)
    made.quant_state = made._parameters["weight"].quant_state  # type: ignore[union-attr]
    return made


def _copied_4bit(layer: Any) -> Iterator[tuple[object, object]]:
    """The codes are shared; the state is a copy that shares its tensors, as bitsandbytes changes it in place."""
    weight, state = layer._parameters["weight"], _state_4bit(layer)
    if state is None:
        return
    own = _shallow(state)
    if getattr(state, "state2", None) is not None:
        own.state2 = _shallow(state.state2)
    made = torch.Tensor._make_subclass(type(weight), weight.data, False)  # type: ignore[attr-defined]
    vars(made).update(vars(weight) | {"quant_state": own, "module": None})
    yield weight, made
    for held in {id(one): one for one in (state, vars(layer).get("quant_state")) if one is not None}.values():
        yield held, own


def _settle_4bit(layer: Any) -> None:
    """A call in eval mode would pack the codes for a kernel of AVX-512, through which no gradient ever passes again."""
    vars(layer)["support_avx512bf16_for_cpu"] = False


def _shallow(value: Any) -> Any:
    made = object.__new__(type(value))
    vars(made).update(vars(value))
    return made


def _problem_8bit(layer: Any) -> str:
    weight = layer._parameters["weight"]
    if layer.state.has_fp16_weights or weight.dtype != torch.int8:
        return "its weight is not quantised (has_fp16_weights, or not moved to the device on which it trains)"
    if weight.is_meta:
        return "its codes are on the meta device: load the model onto the device on which it trains"
    return ""


def _dtype_8bit(layer: Any) -> torch.dtype | None:
    bias = layer._parameters.get("bias")
    return None if bias is None else bias.dtype


def _scales_8bit(layer: Any) -> Tensor:
    weight, state = layer._parameters["weight"], layer.state
    scales: Tensor = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
    return scales


def _read_8bit(layer: Any) -> Tensor:
    numbers: Tensor = _functions().int8_vectorwise_dequant(layer._parameters["weight"].data, _scales_8bit(layer))
    return numbers


def _again_8bit(layer: Any, weight: Tensor) -> nn.Module:
    made = _bare(layer)
    codes, scales, _ = _functions().int8_vectorwise_quant(weight.detach().to(torch.float16).contiguous())
    old = layer._parameters["weight"]
    new = torch.Tensor._make_subclass(type(old), codes, False)  # type: ignore[attr-defined]
    vars(new).update(CB=codes, SCB=scales, has_fp16_weights=False)
    made._parameters["weight"] = new
    made.state = _shallow(layer.state)
    vars(made.state).update(CB=None, SCB=None)
    return made


def _copied_8bit(layer: Any) -> Iterator[tuple[object, object]]:
    """Codes and scales are shared; a forward moves them from the parameter to the state, so each has both its own."""
    weight, state = layer._parameters["weight"], layer.state
    made = torch.Tensor._make_subclass(type(weight), weight.data, False)  # type: ignore[attr-defined]
    vars(made).update(vars(weight))
    yield weight, made
    yield state, _shallow(state)


def _bare(layer: Any) -> Any:
    """Return a shallow copy of a layer with tables of its own."""
    made = object.__new__(original_class(layer))
    vars(made).update({name: dict(v) if name in _TABLES else v for name, v in vars(layer).items()})
    return made


_TABLES = ("_parameters", "_buffers", "_modules")

_KNOWN: dict[str, Packing] = {
    "bitsandbytes.nn.modules.Linear4bit": Packing(
        "weight", _problem_4bit, _dtype_4bit, _read_4bit, _again_4bit, _copied_4bit, _settle_4bit
    ),
    "bitsandbytes.nn.modules.Linear8bitLt": Packing(
        "weight", _problem_8bit, _dtype_8bit, _read_8bit, _again_8bit, _copied_8bit
    ),
}
