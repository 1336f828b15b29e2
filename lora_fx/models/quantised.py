"""Weights that are not plain tensors of numbers: quantised ones, which say themselves what numbers they stand for."""

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
