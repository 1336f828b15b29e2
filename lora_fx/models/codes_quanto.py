"""optimum-quanto's frozen `QLinear`: its weight is a tensor that holds codes, and knows how it is multiplied by."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.codelayout import CodeLayout, bare
from lora_fx.models.quantised import is_quantised
from lora_fx.models.swap import original_class


class _QuantoProduct(torch.autograd.Function):
    """What the library computes of x; its own backward pass multiplies two dtypes where autocast was on (0.2.7)."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        kind: Any = original_class(layer)
        result: Tensor = kind.forward(layer, x)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        onto_x = grad @ _read(ctx.layer).to(grad.dtype) if ctx.needs_input_grad[0] else None
        onto_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return onto_x, onto_bias, None


def _run(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = _QuantoProduct.apply(x, layer._parameters["bias"], layer)  # type: ignore[no-untyped-call]
    return result


def _codes(layer: Any) -> Tensor | None:
    weight = layer._parameters.get("weight")
    return weight if weight is not None and is_quantised(weight) else None


def _problem(layer: Any) -> str:
    if layer.activation_qtype is not None:
        return "its inputs and results are rounded too (activations); quantise weights alone"
    if layer._parameters["weight"].is_meta:
        return "its codes are on the meta device: load the model onto the device on which it trains"
    return ""


def _dtype(layer: Any) -> torch.dtype:
    dtype: torch.dtype = layer._parameters["weight"].dtype
    return dtype


def _read(layer: Any) -> Tensor:
    with torch.no_grad():
        numbers: Tensor = layer._parameters["weight"].dequantize()
    return numbers


def _again(layer: Any, weight: Tensor) -> nn.Module:
    """Quantise as `freeze` does: with the layer's kind, group size and way of finding scales."""
    kind: Any = original_class(layer)
    made: nn.Module = bare(layer)
    made._parameters["weight"] = nn.Parameter(weight.detach().to(_dtype(layer)), requires_grad=False)
    with torch.no_grad():
        made._parameters["weight"] = nn.Parameter(kind.qweight.fget(made), requires_grad=False)
    return made


QUANTO = CodeLayout(_codes, _problem, _dtype, _read, _again, run=_run)
