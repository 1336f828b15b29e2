"""What is kept of the inputs: of a norm's output the norm's input, which autograd keeps anyway; of some, a half.

Of a norm inside of a graph `recompute` knows; this one stands before the layers, in another block or in no graph at
all, as where a block ends with its norm (BERT).
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.models.torch_internals import hook_on_saved, moves_tensors, packing

Made = tuple[tuple[Tensor | None, ...], Callable[..., Tensor] | None]
_EXACT = (torch.float32, torch.float64)
_EPSILON = "lora_fx_epsilon"
"""Under which name a node of autograd knows the ε of its layer norm, of which torch keeps nothing."""


def told_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return torch's layer norm, from whose result the layers behind it know how to make it again; stands in graphs.

    Arguments have the names that torch gives them: graphs call it as they called that.
    """
    result = F.layer_norm(input, normalized_shape, weight, bias, eps)
    if result.grad_fn is not None:
        notes: Any = result.grad_fn.metadata
        notes[_EPSILON] = eps
    return result


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
    (offloading, checkpointing) was given what the norm keeps, and where its mean is kept in half precision and nobody
    has told its ε (`told_layer_norm`).
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
    if type(given) is not Tensor or given.dtype != x.dtype:
        return None
    if mean.dtype not in _EXACT:
        epsilon = node.metadata.get(_EPSILON)
        again = functools.partial(_normed_again, node._saved_normalized_shape, epsilon)
        return None if epsilon is None else ((given, node._saved_weight, node._saved_bias), again)
    kept = (given, mean.detach(), deviation.detach(), node._saved_weight, node._saved_bias)
    return kept, functools.partial(_normed, len(node._saved_normalized_shape))


def _normed_again(
    shape: Sequence[int], epsilon: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # as it was: else its result would have another dtype
        return F.layer_norm(x, shape, weight, bias, epsilon)


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
