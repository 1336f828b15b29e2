"""hqq's layers: codes in `W_q`, scales and zeros in a dict beside it, a forward that the library chooses for all."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.codelayout import CodeLayout, held
from lora_fx.models.swap import original_class


def _problem(layer: Any) -> str:
    notes, backend = layer.meta or {}, layer.backend.value
    if not layer.ready:
        return "its weight is not quantised yet"
    if layer.W_q.is_meta:
        return "its codes are on the meta device: load the model onto the device on which it trains"
    if notes.get("quant_scale") or notes.get("quant_zero") or "zero_scale" in notes:
        return "its scales are codes too, which hqq writes into its notes while it runs; quantise without quant_scale, \
quant_zero and offload_meta"
    if "int8" in backend:
        return f"hqq's backend {backend} rounds inputs, through which no gradient passes; HQQLinear.set_backend(…)"
    return ""


def _dtype(layer: Any) -> torch.dtype | None:
    dtype: torch.dtype = layer.compute_dtype
    return dtype


def _read(layer: Any) -> Tensor:
    numbers: Tensor = layer.dequantize()
    return numbers


def _again(layer: Any, weight: Tensor) -> nn.Module:
    kind: Any = original_class(layer)
    settings = copy.deepcopy(layer.quant_config)
    notes = {**copy.deepcopy(settings), "offload_meta": layer.offload_meta}
    made: nn.Module = kind(None, notes, compute_dtype=layer.compute_dtype, device=layer.device)
    made.quantize(weight.detach().to(layer.compute_dtype), **settings)  # type: ignore[operator]
    made.bias = layer.bias
    return made


def _copied(layer: Any) -> Iterator[tuple[object, object]]:
    """Scales and zeros are shared; the dict is a copy's own, as hqq writes to it."""
    yield layer.meta, dict(layer.meta)


HQQ = CodeLayout(held("W_q"), _problem, _dtype, _read, _again, _copied)
