"""What is asked of many tensors at once, or done to them: in few steps, and all or none."""

import bisect
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lora_fx.models.torch_internals import foreach_copy, foreach_norm, foreach_sub

_KINDS = (Tensor, nn.Parameter)


def all_equal(groups: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[bool]:
    """Return of each group whether its tensors equal their partners; a GPU is waited for once, for all groups.

    NaN equals nothing.
    """
    found = [all(map(torch.equal, ones, others)) if _on_cpu(ones) else False for ones, others in groups]
    waiting: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for number, (ones, others) in enumerate(groups):
        if not _on_cpu(ones):
            largest = foreach_norm(list(foreach_sub(list(ones), list(others))), math.inf)
            waiting.setdefault(ones[0].device, []).append((number, torch.stack(list(largest)).float().amax()))
    for differences in waiting.values():
        for (number, _), value in zip(differences, torch.stack([one for _, one in differences]).tolist(), strict=True):
            found[number] = value == 0
    return found


def _on_cpu(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's values lie one after another in memory."""
    return tensor.layout is torch.strided and tensor.is_contiguous()


def are_alike(targets: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether plain tensors of one device and dtype, with their memory in order, can be copied with no step between.

    Then nothing can end the copying in the middle: no value is converted, sent or drawn out.
    """
    both = [*targets, *values]
    if not {*map(type, both)} <= {*_KINDS} or {tensor.layout for tensor in both} != {torch.strided}:
        return False
    if {tensor.is_contiguous() for tensor in both} != {True}:
        return False
    if len({tensor.dtype for tensor in both}) > 1 or len({tensor.device for tensor in both}) > 1:
        return False
    return [target.shape for target in targets] == [value.shape for value in values]


def share_memory(targets: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether memory of a value is that of a target, but for its own; both are plain tensors with values."""
    owned = sorted([(target.data_ptr(), target.data_ptr() + target.nbytes) for target in targets])
    starts = [start for start, _ in owned]
    for target, value in zip(targets, values, strict=True):
        start = value.data_ptr()
        at = bisect.bisect_left(starts, start + value.nbytes) - 1
        if at >= 0 and owned[at][1] > start and start != target.data_ptr():
            return True
    return False


def surely_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are finite, as seen from the lengths of the tensors; False where that does not tell.

    No length is finite if a value is not; nor is that of values whose squares are too large.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    known = [tensor for group in groups.values() for tensor in group]
    if not {*map(type, known)} <= {*_KINDS} or not {tensor.layout for tensor in known} <= {torch.strided}:
        return False
    if not all(dtype.is_floating_point for dtype, _ in groups):
        return False
    with torch.no_grad():
        lengths = [torch.stack(list(foreach_norm(group, 2))) for group in groups.values()]
        return all(bool(length.isfinite().all()) for length in lengths)


def copied_together(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors that are alike, in place and in one step; no gradient is wanted."""
    with torch.no_grad():
        foreach_copy(list(targets), list(values))
