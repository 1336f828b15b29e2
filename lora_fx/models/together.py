"""What is asked of many tensors at once, or done to them: in few steps, and all or none."""

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_fx.models.torch_internals import foreach_copy, foreach_norm, foreach_sub

PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors that are numbers in memory and nothing else."""


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
    if not {*map(type, both)} <= {*PLAIN} or {tensor.layout for tensor in both} != {torch.strided}:
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


_MOST_TOGETHER = 1 << 22
"""Values that are put into one tensor to be summed: 16 MB of float32."""


def surely_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are finite, as seen from sums; False where that does not tell.

    No sum is finite if a value is not; nor is that of values that are too large together.  Tensors that differ in their
    first size alone are summed as one: for small ones a copy costs less than an operation for each.
    """
    known = list(tensors)
    if not {*map(type, known)} <= {*PLAIN} or not {tensor.layout for tensor in known} <= {torch.strided}:
        return False
    if not all(dtype.is_floating_point for dtype in {tensor.dtype for tensor in known}):
        return False
    groups: dict[object, list[Tensor]] = {}
    are_of_one = len({tensor.dtype for tensor in known}) == len({tensor.device for tensor in known}) == 1
    for tensor in known:
        size = tensor.shape[1:]
        groups.setdefault(size if are_of_one else (size, tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad():
        sums = [part.sum(dtype=_wide(part.dtype)) for group in groups.values() for part in _joined(group)]
        return all(math.isfinite(total.item()) for total in sums)


def _joined(group: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield tensors that hold the values of all in a group, which differ in their first size alone, or have none."""
    sizes = [tensor.numel() for tensor in group]
    if sum(sizes) <= _MOST_TOGETHER and 0 not in {tensor.dim() for tensor in group}:
        yield torch.cat(list(group))
        return
    waiting: list[Tensor] = []
    number = 0
    for tensor, size in zip(group, sizes, strict=True):
        if size >= _MOST_TOGETHER or not tensor.dim():
            yield tensor
            continue
        if waiting and number + size > _MOST_TOGETHER:
            yield torch.cat(waiting)
            waiting, number = [], 0
        waiting.append(tensor)
        number += size
    if waiting:
        yield torch.cat(waiting)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def copied_together(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors that are alike, in place and in one step; no gradient is wanted."""
    with torch.no_grad():
        foreach_copy(list(targets), list(values))
