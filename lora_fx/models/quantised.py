"""Weights that are not plain tensors of numbers: quantised ones, which say themselves what numbers they stand for."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn


def is_quantised(weight: Tensor) -> bool:
    """Whether the weight is of a subclass of Tensor that can dequantise itself (torchao's, for instance)."""
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


def dense(weight: Tensor) -> Tensor:
    """Return the numbers that a weight stands for, as a plain tensor; a plain weight is returned as it is."""
    if not is_quantised(weight):
        return weight
    plain: Tensor = weight.dequantize()
    return plain


def gradients_beside_codes(
    grad: Tensor, needed: Sequence[bool], numbers: Callable[[], Tensor]
) -> tuple[Tensor | None, Tensor | None, None]:
    """Return the gradients of x and of the bias of x Wᵀ + b, and none of the layer whose codes W is; of those needed.

    Args:
        grad: of the result, [..., out].
        needed: of x and of the bias, whether it is.
        numbers: reads W, [out, in], which is not kept from the forward pass.
    """
    onto_x = grad @ numbers().to(grad.dtype) if needed[0] else None
    onto_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needed[1] else None
    return onto_x, onto_bias, None


def dequantised_parameters_(model: nn.Module) -> nn.Module:
    """Give the model plain parameters in place of those that can dequantise themselves, in place, and return it."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and is_quantised(parameter):
                plain = dense(parameter).detach().clone()
                module._parameters[name] = nn.Parameter(plain, requires_grad=False)
                forget_quantisation(module)
    return model


def forget_quantisation(module: nn.Module) -> None:
    """Take away what torchao's quantize_ hangs on a layer beside its weight: how it prints, which cannot be pickled."""
    module.__dict__.pop("extra_repr", None)
