"""Compare the gradients of two runs of the same call: what a graph must not lose besides values."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.objects import tensors_in

Run = tuple[Any, Any, nn.Module]
"""(result, arguments, module) of a run with gradients."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Of the largest value: gradients that are summed up in another order round differently."""


def gradients_differ(one: Run, other: Run, precision: torch.dtype | None = None) -> str | None:
    """Return how the gradients of all inputs and trained parameters differ between two runs; None if they agree.

    `precision` is the dtype in which the runs round, where that is coarser than the dtype of the gradients.
    """
    outputs, expected = _outputs(one[0]), _outputs(other[0])
    if [tensor.requires_grad for tensor in outputs] != [tensor.requires_grad for tensor in expected]:
        return "other results require a gradient"
    names = _sources(other).keys()
    for name, a, b in zip(names, _gradients(outputs, one), _gradients(expected, other), strict=True):
        if (a is None) != (b is None):
            return f"{'no' if a is None else 'a'} gradient reaches {name}"
        if a is not None and b is not None and _far(a, b, precision):
            return f"the gradient of {name} differs"
    return None


def values_differ(result: Any, expected: Any, precision: torch.dtype | None = None) -> str | None:
    """Return how the floating-point tensors of two results differ beyond rounding; None if they agree."""
    ones, others = _outputs(result), _outputs(expected)
    if [tensor.shape for tensor in ones] != [tensor.shape for tensor in others]:
        return "the results have other shapes"
    far = (_far(one, other, precision) for one, other in zip(ones, others, strict=True))
    return "the result differs" if any(far) else None


def _outputs(result: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]


def _sources(run: Run) -> dict[str, Tensor]:
    """Return what gradients are wanted of: the arguments and parameters that require one."""
    given = [tensor for tensor in tensors_in(run[1]) if tensor.requires_grad and tensor.is_leaf]
    sources = {f"argument {index}": tensor for index, tensor in enumerate(given)}
    return sources | {name: parameter for name, parameter in run[2].named_parameters() if parameter.requires_grad}


def _gradients(outputs: list[Tensor], run: Run) -> tuple[Tensor | None, ...]:
    sources, wanted = list(_sources(run).values()), [output for output in outputs if output.requires_grad]
    if not wanted or not sources:
        return (None,) * len(sources)
    return torch.autograd.grad(wanted, sources, [_cotangent(output) for output in wanted], allow_unused=True)


def _cotangent(result: Tensor) -> Tensor:
    """Return numbers that are not all alike: the sum of a layer norm's output is a constant, its gradients rounding."""
    numbers = torch.arange(result.numel(), dtype=torch.float32, device=result.device).cos_()
    return numbers.view(result.shape).to(result.dtype)


def _far(a: Tensor, b: Tensor, precision: torch.dtype | None) -> bool:
    scale = b.abs().max() if b.numel() else b.new_zeros(())
    tolerance = max(_TOLERANCE[b.dtype], _TOLERANCE.get(precision or b.dtype, 0.1))
    return not bool(((a - b).abs() <= tolerance * scale + 1e-12).all() | ~torch.isfinite(scale))
