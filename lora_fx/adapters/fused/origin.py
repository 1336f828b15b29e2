"""What is kept of the inputs: of a norm's output the norm's input, which autograd keeps anyway; of some, a half.

Of a norm inside of a graph `recompute` knows; this one stands before the layers, in another block or in no graph at
all, as where a block ends with its norm (BERT).
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.models.torch_internals import hook_on_saved, moves_tensors, packing

Made = tuple[tuple[Tensor | None, ...], Callable[..., Tensor] | None]
_EXACT = (torch.float32, torch.float64)


def kept_of(
    inputs: Sequence[Tensor], is_made: bool, halved: Sequence[bool]
) -> tuple[tuple[Tensor | None, ...], Callable[..., tuple[Tensor, ...]] | None]:
    """Return (tensors, function): what is kept of the inputs, and what gives them back, None where these are they.

    Args:
        inputs: of the layers, or, where x `is_made`, of what makes it.
        is_made: whether x is made again from the inputs.
        halved: which inputs are kept in bfloat16, if they are in float32; () for none.
    """
    if any(halved):
        which = tuple(half and x.dtype is torch.float32 for half, x in zip(halved, inputs, strict=True))
        kept = tuple(x.to(torch.bfloat16) if half else x for half, x in zip(which, inputs, strict=True))
        return kept, functools.partial(_widened, which)
    if is_made:
        return tuple(inputs), None
    of_x, make = origin(inputs[0])
    return of_x, None if make is None else functools.partial(_alone, make)


def _widened(which: Sequence[bool], *kept: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float() if half else x for half, x in zip(which, kept, strict=True))


def _alone(make: Callable[..., Tensor], *kept: Tensor) -> tuple[Tensor, ...]:
    return (make(*kept),)


def origin(x: Tensor) -> Made:
    """Return (tensors, function): what autograd keeps of the layer norm that made x, and what makes x of them again.

    Else ((x,), None): where x comes from elsewhere or has been changed in place since, where a hook of torch's
    (offloading, checkpointing) was given what the norm keeps, and where its mean is kept in half precision.
    """
    node = x.grad_fn
    if type(node).__name__ == "NativeLayerNormBackward0" and x._version == 0 and not moves_tensors(packing()):
        with contextlib.suppress(RuntimeError, AttributeError):  # its input was changed since, or torch does not tell
            return _of_norm(node, x) or ((x,), None)
    return (x,), None


def _of_norm(node: Any, x: Tensor) -> Made | None:
    if moves_tensors(hook_on_saved(node, "input")):
        return None
    given, mean, deviation = node._saved_input, node._saved_result1, node._saved_result2
    if type(given) is not Tensor or given.dtype != x.dtype or mean.dtype not in _EXACT:
        return None
    kept = (given, mean.detach(), deviation.detach(), node._saved_weight, node._saved_bias)
    return kept, functools.partial(_normed, len(node._saved_normalized_shape))


def _normed(
    dims: int, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return (x - mean) · deviation · weight + bias, where `deviation` is 1 / √(variance + ε), over the last `dims`."""
    wide = x.to(mean.dtype)
    if torch.is_grad_enabled():  # may be differentiated again: ε is what x's own variance lacks of the one kept
        variance, middle = torch.var_mean(wide, tuple(range(-dims, 0)), correction=0, keepdim=True)
        normed = (wide - middle) * torch.rsqrt(variance + (deviation**-2 - variance).detach())
    else:
        normed = (wide - mean).mul_(deviation)
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(x.dtype)
