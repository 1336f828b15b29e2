"""Whether the rows of a batch are kept apart by a block, bit by bit: shown by putting other rows beside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_fx.capture.calls.ambient import AmbientState, RandomState, in_clean_thread
from lora_fx.capture.calls.arguments import rebuild
from lora_fx.regions.gradients import far_off
from lora_fx.regions.prefix.code import Independence

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def chosen(arguments: Arguments, batch: int, rows: Tensor) -> Arguments:
    """Return the arguments of a call with these rows of its batch: of all tensors whose first size is that of it."""

    def of(value: Any) -> Any:
        is_batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        return value.index_select(0, rows.to(value.device)) if is_batched else value

    return rebuild(*arguments, of)


def rows_of(
    run: Callable[[Arguments], Tensor], arguments: Arguments, result: Tensor, ambient: AmbientState
) -> Independence:
    """Return how far the rows of a result depend on each other, found out on other batches.

    The first and the last row fill a batch of this size each; the first one stands among others with values that are
    far off, and alone.  Its bits must be the same everywhere: then neither what the others hold, nor where it stands,
    nor, if it is the same alone, how many there are reaches it.

    Args:
        run: makes the call with other arguments, and returns its tensor.
        arguments: of the call; tensors with the first size of the result have a row for each of its.
        result: of the call.
        ambient: what was around it.
    """
    batch = len(result)
    if batch == 1:
        return Independence(True, True)

    def again(rows: list[int], far: bool = False) -> Tensor:
        given = chosen(arguments, batch, torch.tensor(rows))
        return run(_far(given, len(rows)) if far else given)

    def found() -> Independence:
        random = RandomState(ambient.devices)
        try:
            with ambient.active():
                first, last = again([0] * batch), again([batch - 1] * batch)
                apart = all(
                    len(other) == batch and all(torch.equal(_bits(one), _bits(result[row])) for one in other)
                    for other, row in ((first, 0), (last, batch - 1))
                )
                apart = apart and torch.equal(_bits(again(list(range(batch)), far=True)[0]), _bits(result[0]))
                return Independence(apart, apart and torch.equal(_bits(again([0])[0]), _bits(result[0])))
        finally:
            random.restore()

    try:
        return in_clean_thread(found)
    except Exception:  # whatever a forward makes of odd values: then they are not shown to be apart
        return Independence(False, False)


def _far(arguments: Arguments, batch: int) -> Arguments:
    """Return the arguments with the same first row and other numbers in all others."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != batch or not value.is_floating_point():
            return value
        moved = value.clone()
        moved[1:] = far_off(moved[1:])
        return moved

    return rebuild(*arguments, of)


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bits: NaN equals NaN, and 0 is not -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
