"""What the layers of quantisation libraries hold, class by class: how to read it, to share it, to make it anew.

The libraries are not imported: whoever has one of their layers has done that.
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.shards import is_sharded, whole
from lora_fx.models.swap import original_class


@dataclass(frozen=True, slots=True)
class CodeLayout:
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
    state, codes = _state_4bit(layer), whole(layer._parameters["weight"])  # gathered, where FSDP2 shards them
    numbers: Tensor = _functions().dequantize_4bit(codes.data.view(-1, 1), state)
    return numbers


def _again_4bit(layer: Any, weight: Tensor) -> nn.Module:
    state = _state_4bit(layer)
    made: nn.Module = _bare(layer)
    old = layer._parameters["weight"]
    made._parameters["weight"] = type(old)(
        weight.detach().to(state.dtype).contiguous(),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.dtype,
    ).to(weight.device)
    vars(made)["quant_state"] = _state_4bit(made)
    return made


def _copied_4bit(layer: Any) -> Iterator[tuple[object, object]]:
    """The codes are shared; the state is a copy that shares its tensors, as bitsandbytes changes it in place."""
    weight, state = layer._parameters["weight"], _state_4bit(layer)
    if state is None:
        return
    own = _shallow(state)
    if getattr(state, "state2", None) is not None:
        own.state2 = _shallow(state.state2)
    if not is_sharded(weight):  # else it is a DTensor, as any other one
        made = type(weight)(weight.data, requires_grad=False)
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
    made: nn.Module = _bare(layer)
    codes, scales, _ = _functions().int8_vectorwise_quant(weight.detach().to(torch.float16).contiguous())
    old = layer._parameters["weight"]
    new = type(old)(codes, requires_grad=False)
    vars(new).update(CB=codes, SCB=scales, has_fp16_weights=False)
    made._parameters["weight"] = new
    state = _shallow(layer.state)
    vars(state).update(CB=None, SCB=None)
    vars(made)["state"] = state
    return made


def _copied_8bit(layer: Any) -> Iterator[tuple[object, object]]:
    """Codes and scales are shared; a forward moves them from the parameter to the state, so each has both its own."""
    weight, state = layer._parameters["weight"], layer.state
    if not is_sharded(weight):
        made = type(weight)(weight.data, requires_grad=False)
        vars(made).update(vars(weight))
        yield weight, made
    yield state, _shallow(state)


def _settle_8bit(layer: Any) -> None:
    """The first call moves codes and scales from the parameter to the state; shared by a copy, it would lose them."""
    if getattr(layer._parameters["weight"], "CB", None) is not None and not layer.state.has_fp16_weights:
        layer.init_8bit_state()


def _bare(layer: Any) -> Any:
    """Return a shallow copy of a layer with tables of its own."""
    made = object.__new__(original_class(layer))
    vars(made).update({name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(layer).items()})
    return made


KNOWN: dict[str, CodeLayout] = {
    "bitsandbytes.nn.modules.Linear4bit": CodeLayout(
        "weight", _problem_4bit, _dtype_4bit, _read_4bit, _again_4bit, _copied_4bit, _settle_4bit
    ),
    "bitsandbytes.nn.modules.Linear8bitLt": CodeLayout(
        "weight", _problem_8bit, _dtype_8bit, _read_8bit, _again_8bit, _copied_8bit, _settle_8bit
    ),
}
