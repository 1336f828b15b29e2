"""optimum-quanto's frozen `QLinear`: its weight is a tensor that holds codes, and knows how it is multiplied by."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.codelayout import CodeLayout, bare, held
from lora_fx.models.quantised import dense, gradients_beside_codes, is_quantised
from lora_fx.models.swap import original_class


class _QuantoProduct(torch.autograd.Function):
    """What the library computes of x; under autocast its own multiplies two dtypes, forwards or backwards (0.2.7)."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        kind: Any = original_class(layer)
        dtype, device = layer._parameters["weight"].dtype, x.device.type
        narrows = torch.is_autocast_enabled(device)
        x = x.to(dtype) if narrows else x  # its kernels take one dtype alone
        # which would narrow x, and not what two and four bits stand for
        narrows = narrows and layer.weight_qtype.bits < 8 and dtype == torch.float32
        with torch.autocast(device, enabled=False) if narrows else nullcontext():
            result: Tensor = kind.forward(layer, x)
        return result.to(torch.get_autocast_dtype(device)) if narrows else result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return gradients_beside_codes(grad, ctx.needs_input_grad, lambda: _read(ctx.layer))


def _run(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = _QuantoProduct.apply(x, layer._parameters["bias"], layer)  # type: ignore[no-untyped-call]
    return result


def _problem(layer: Any) -> str:
    if layer.activation_qtype is not None:
        return "its inputs and results are rounded too (activations); quantise weights alone"
    if not is_quantised(layer._parameters["weight"]):
        return "its weight is rounded at each call; optimum.quanto.freeze(model) before"
    if layer._parameters["weight"].is_meta:
        return "its codes are on the meta device: load the model onto the device on which it trains"
    return ""


def _broken(layer: Any) -> str:
    """What is sharded of such a tensor are the numbers that it stands for."""
    return "" if is_quantised(layer._parameters["weight"]) else "fully_shard has made plain numbers of its codes"


def _dtype(layer: Any) -> torch.dtype:
    dtype: torch.dtype = layer._parameters["weight"].dtype
    return dtype


def _read(layer: Any) -> Tensor:
    with torch.no_grad():
        return dense(layer._parameters["weight"])


def _again(layer: Any, weight: Tensor) -> nn.Module:
    """Quantise as `freeze` does: with the layer's kind, group size and way of finding scales."""
    kind: Any = original_class(layer)
    made: nn.Module = bare(layer)
    made._parameters["weight"] = nn.Parameter(weight.detach().to(_dtype(layer)), requires_grad=False)
    with torch.no_grad():
        made._parameters["weight"] = nn.Parameter(kind.qweight.fget(made), requires_grad=False)
    return made


QUANTO = CodeLayout(held("weight"), _problem, _dtype, _read, _again, broken=_broken, run=_run)
