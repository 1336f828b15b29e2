"""What is asked of many tensors at once, or done to them: in few steps, and all or none."""

import bisect
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lora_fx.models.torch_internals import foreach_copy, foreach_norm, foreach_sub, kinds_checked

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


class Alike:
    """What was found of tensors and of values that are alike; others of the same kinds need not be looked through."""

    def __init__(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._targets, self._values = kinds_checked(targets), kinds_checked(values)
        self._groups = _groups(values)
        self._sizes = [value.nbytes for value in values]

    @classmethod
    def of(cls, targets: Sequence[Tensor], values: Sequence[Tensor]) -> "Alike | None":
        """Return what is known of them if they are alike (`are_alike`)."""
        return cls(targets, values) if are_alike(targets, values) else None

    def holds(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Whether these are surely alike too; False where that must be looked for."""
        return self._targets(targets) and self._values(values)

    def share_memory(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Whether those for which it holds share memory, as `share_memory` sees it."""
        return _overlap(targets, self._sizes, values, self._sizes)

    def surely_finite(self, values: Sequence[Tensor]) -> bool:
        """Whether values for which it holds are finite, as `surely_finite` sees it."""
        return _have_finite_sums(values, self._groups)


def share_memory(targets: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether memory of a value is that of a target, but for its own; both are plain tensors with values."""
    return _overlap(targets, [one.nbytes for one in targets], values, [one.nbytes for one in values])


def _overlap(
    targets: Sequence[Tensor], their_sizes: Sequence[int], values: Sequence[Tensor], sizes: Sequence[int]
) -> bool:
    own = [*map(Tensor.data_ptr, targets)]
    owned = sorted(zip(own, their_sizes, strict=True))
    starts = [start for start, _ in owned]
    for mine, start, size in zip(own, map(Tensor.data_ptr, values), sizes, strict=True):
        at = bisect.bisect_left(starts, start + size) - 1
        if at >= 0 and start != mine and sum(owned[at]) > start:
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
    return _have_finite_sums(known, _groups(known))


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of tensors in groups that differ in their first size alone, each small enough to be joined."""
    alike: dict[object, list[int]] = {}
    for number, tensor in enumerate(tensors):
        alone = None if tensor.dim() and tensor.numel() < _MOST_TOGETHER else number
        alike.setdefault((tensor.shape[1:], tensor.dtype, tensor.device, alone), []).append(number)
    found: list[list[int]] = []
    for group in alike.values():
        together: list[int] = []
        total = 0
        for number in group:
            size = tensors[number].numel()
            if total + size > _MOST_TOGETHER:
                found.append(together)
                together, total = [], 0
            together.append(number)
            total += size
        found.append(together)
    return found


def _have_finite_sums(tensors: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> bool:
    sums: list[Tensor] = []
    with torch.no_grad():
        for group in filter(None, groups):
            ones = [tensors[number] for number in group]
            one = torch.cat(ones) if len(ones) > 1 else ones[0]
            sums.append(one.sum(dtype=_wide(one.dtype)))
        return all(math.isfinite(total.item()) for total in sums)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def copied_together(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors that are alike, in place and in one step; no gradient is wanted."""
    with torch.no_grad():
        foreach_copy(list(targets), list(values))
