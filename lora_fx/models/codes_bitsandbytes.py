"""bitsandbytes' layers: NF4 and FP4 (`Linear4bit`), LLM.int8 (`Linear8bitLt`)."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.codelayout import CodeLayout, bare, held, shallow
from lora_fx.models.shards import is_sharded


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
    made: nn.Module = bare(layer)
    old = layer._parameters["weight"]
    kind = importlib.import_module("bitsandbytes.nn").Params4bit  # of codes that were gathered it is torch's own
    made._parameters["weight"] = kind(
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
    own = shallow(state)
    if getattr(state, "state2", None) is not None:
        own.state2 = shallow(state.state2)
    if not is_sharded(weight):  # else it is a DTensor, as any other one
        made = type(weight)(weight.data, requires_grad=False)
        vars(made).update(vars(weight) | {"quant_state": own, "module": None})
        yield weight, made
    for found in {id(one): one for one in (state, vars(layer).get("quant_state")) if one is not None}.values():
        yield found, own


def _settle_4bit(layer: Any) -> None:
    """A call in eval mode would pack the codes for a kernel of AVX-512, through which no gradient ever passes again."""
    vars(layer)["support_avx512bf16_for_cpu"] = False


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
    made: nn.Module = bare(layer)
    codes, scales, _ = _functions().int8_vectorwise_quant(weight.detach().to(torch.float16).contiguous())
    old = layer._parameters["weight"]
    new = type(old)(codes, requires_grad=False)
    vars(new).update(CB=codes, SCB=scales, has_fp16_weights=False)
    made._parameters["weight"] = new
    state = shallow(layer.state)
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
    yield state, shallow(state)


def _settle_8bit(layer: Any) -> None:
    """The first call moves codes and scales from the parameter to the state; shared by a copy, it would lose them."""
    if getattr(layer._parameters["weight"], "CB", None) is not None and not layer.state.has_fp16_weights:
        layer.init_8bit_state()


def _broken_8bit(layer: Any) -> str:
    """bitsandbytes reads codes and scales off its own kind of parameter, which what FSDP2 gathers is not."""
    return "" if "CB" in vars(layer._parameters["weight"]) else "fully_shard has sharded its codes"


FOUR_BITS = CodeLayout(held("weight"), _problem_4bit, _dtype_4bit, _read_4bit, _again_4bit, _copied_4bit, _settle_4bit)
EIGHT_BITS = CodeLayout(
    held("weight"), _problem_8bit, _dtype_8bit, _read_8bit, _again_8bit, _copied_8bit, _settle_8bit, _broken_8bit
)
