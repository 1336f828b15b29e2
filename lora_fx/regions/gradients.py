"""Compare the gradients of two runs of the same call: what a graph must not lose besides values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.objects import tensors_in

Run = tuple[Any, Any, nn.Module]
"""(result, arguments, module) of a run with gradients."""
_HALVES = (torch.bfloat16, torch.float16)
_EPS = {dtype: torch.finfo(dtype).eps for dtype in _HALVES}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, **{dtype: 8 * eps for dtype, eps in _EPS.items()}}
"""Of the largest value: gradients that are summed up in another order round differently."""
_TOLERANCE_OF_ALL = {dtype: 4 * eps for dtype, eps in _EPS.items()}
"""Of the root mean square, in half precision: a factor that is wrong shows there, and rounding evens out."""
_MASKED = 1e4
"""Values of this size are those of masks."""
_OF_NOISE = 8
"""How many times what rounding does to a gradient two of them may differ by, where that is more than the tolerance."""
_OF_MOTION = 2
"""The same by root mean square, in half precision: rounding does so much there that 8 times would hide errors."""
_ALL_NOISE = 0.25
"""From which part of its size on a gradient that rounding moves so far is nothing but rounding."""
_FAR_OFF = 50.0


def gradients_differ(
    one: Run, other: Run, precision: torch.dtype | None = None, shaken: Callable[[], Run] | None = None
) -> str | None:
    """Return how the gradients of all inputs and trained parameters differ between two runs; None if they agree.

    `precision` is the dtype in which the runs round, where that is coarser than the dtype of the gradients.  `shaken`
    gives the run of `other` with inputs that are rounded otherwise: a gradient that is nothing but rounding, such as
    that of a query with one key, changes there as much as between the two.
    """
    outputs, expected = _outputs(one[0]), _outputs(other[0])
    if [tensor.requires_grad for tensor in outputs] != [tensor.requires_grad for tensor in expected]:
        return "other results require a gradient"
    far: dict[str, tuple[Tensor, Tensor]] = {}
    names = _sources(other).keys()
    for name, a, b in zip(names, _gradients(outputs, one), _gradients(expected, other), strict=True):
        if (a is None) != (b is None):
            return f"{'no' if a is None else 'a'} gradient reaches {name}"
        if a is not None and b is not None and _far(a, b, precision):
            far[name] = (a, b)
    if far and shaken is not None:
        again = shaken()
        moved = dict(zip(names, _gradients(_outputs(again[0]), again), strict=True))
        far = {name: (a, b) for name, (a, b) in far.items() if not _is_noise(a, b, moved[name], precision)}
    return f"the gradient of {next(iter(far))} differs" if far else None


def rounded_otherwise(value: Tensor) -> Tensor:
    """Return a copy of floating-point values, about every second one greater by one unit in its last place.

    Of masks, whose values are infinite or nearly so, nothing changes.
    """
    copy = value.detach().clone()
    if value.is_floating_point():
        up = torch.arange(value.numel(), device=value.device).mul_(7).remainder_(13).lt_(6).view(value.shape).bool()
        copy = torch.where(up & (value.abs() < _MASKED), copy * (1 + torch.finfo(value.dtype).eps), copy)
    return copy.requires_grad_(value.requires_grad)


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
    return _numbers(result)


def _numbers(like: Tensor) -> Tensor:
    numbers = torch.arange(like.numel(), dtype=torch.float32, device=like.device).cos_()
    return numbers.view(like.shape).to(like.dtype)


def far_off(values: Tensor) -> Tensor:
    """Return other numbers, moved and then multiplied by far more than what is there: what they reach will show it."""
    return (values + _numbers(values)) * _FAR_OFF


def with_far_rows(hidden: Tensor, dead: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how arguments are copied so that these rows of hidden states, [batch, tokens], are far off."""

    def copy(value: Tensor) -> Tensor:
        other = value.detach().clone()
        if value is hidden:
            other = torch.where(dead.unsqueeze(-1), far_off(other), other)
        return other.requires_grad_(value.requires_grad)

    return copy


def _is_noise(a: Tensor, b: Tensor, moved: Tensor | None, precision: torch.dtype | None) -> bool:
    if moved is None:
        return False
    if precision in _HALVES and _size(moved, b) < _ALL_NOISE * _size(b):
        return _size(a, b) <= _OF_MOTION * _size(moved, b)
    return bool((a - b).abs().max() <= _OF_NOISE * (moved - b).abs().max())


def _far(a: Tensor, b: Tensor, precision: torch.dtype | None) -> bool:
    precision = precision or b.dtype
    scale = b.abs().max() if b.numel() else b.new_zeros(())
    if not bool(torch.isfinite(scale)):
        return False
    tolerance = max(_TOLERANCE[b.dtype], _TOLERANCE.get(precision, 0.1))
    near = bool(((a - b).abs() <= tolerance * scale + 1e-12).all())
    return not near or (precision in _HALVES and _size(a, b) > _TOLERANCE_OF_ALL[precision] * _size(b) + 1e-12)


def _size(a: Tensor, b: Tensor | None = None) -> float:
    """Return the root of the sum of squares of a, or of its difference from b, in float32 at the least."""
    wide = torch.promote_types(a.dtype, torch.float32)  # float64 is not on all devices
    return float(torch.linalg.vector_norm(a.to(wide) if b is None else a.to(wide) - b.to(wide)))
