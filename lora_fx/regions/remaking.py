"""What was computed on some rows and can be computed again on all of them, as long as nothing has changed."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_fx.capture.calls.ambient import AmbientState, RandomState
from lora_fx.errors import RefusedError
from lora_fx.liveness.head import same_bits, version_of
from lora_fx.liveness.padding import Rows

Results = dict["Remaking", list[Any]]
"""What calls have given that were made again on all rows."""


class Remaking:
    """Something that was computed on packed rows, and can be computed again on all of them."""

    rows: Rows

    def parents(self) -> "tuple[Remaking, ...]":
        """Return what it is made of."""
        raise NotImplementedError

    def again(self, made: Results) -> list[Any]:
        """Return its results with all rows; those of its parents have been made."""
        raise NotImplementedError

    def note_asked(self) -> None:
        """Note that somebody wants all rows."""

    def whole(self, leaf: int) -> Tensor:
        """Return one of the results with all rows, made again from the first block on.

        Raises:
            RefusedError: what it is made of has changed since.
        """
        made: Results = {}
        for each in self._in_order(set()):
            each.note_asked()
            made[each] = each.again(made)
        result: Tensor = made[self][leaf]
        return result

    def _in_order(self, seen: "set[Remaking]") -> "Iterator[Remaking]":
        waiting: list[tuple[Remaking, bool]] = [(self, False)]
        while waiting:
            each, ready = waiting.pop()
            if ready:
                yield each
            elif each not in seen:
                seen.add(each)
                waiting.append((each, True))
                waiting += [(parent, False) for parent in each.parents()]


def check_unchanged(same: bool, what: str = "rows of padding") -> None:
    """Raise RefusedError unless what rows are made of is as it was when the others were made."""
    if not same:
        raise RefusedError(
            f"{what} are asked for, and the weights or inputs that they are made of have changed since",
            advice='read the result before the optimiser\'s step, or apply without "liveness" in `optimise`',
        )


class Unchanged:
    """Tensors as they are now: how often each has been written to, and of those that are trained, their values."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held = [
            (tensor, version_of(tensor), tensor.detach().clone() if tensor.requires_grad and tensor.is_leaf else None)
            for tensor in tensors
        ]

    def check(self, what: str) -> None:
        """Raise RefusedError if one of them has changed, also if torch did not count it, as with fused optimisers."""
        check_unchanged(
            all(
                version_of(tensor) == version and (copy is None or same_bits(tensor, copy))
                for tensor, version, copy in self._held
            ),
            what,
        )


@contextlib.contextmanager
def remade(ambient: AmbientState, random: RandomState | None) -> Iterator[None]:
    """Set up what was around a call when it was made: autocast, and random numbers where it drew some."""
    after = None if random is None else RandomState(ambient.devices)
    grad = torch.is_grad_enabled()
    try:
        if random is not None:
            random.restore()
        with ambient.active(), torch.set_grad_enabled(grad):
            yield
    finally:
        if after is not None:
            after.restore()
