"""What graphs on packed rows call in the place of what asks for sizes, reshapes, drops out or returns."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_fx.liveness.padding import Rows, packed_rows, unpacked_rows


class HasSizes(Protocol):
    """What knows how many sequences there are, and of what length."""

    @property
    def batch(self) -> int: ...

    @property
    def length(self) -> int: ...


def whole_size(x: Tensor, rows: Rows, asked: int | str | None) -> Any:
    """Return the size that x has with all its rows; stands in graphs."""
    return size_of(rows, x.shape[2:], asked)


def size_of(rows: HasSizes, behind: Sequence[int], asked: int | str | None) -> Any:
    """Return the size of a tensor [batch, length, *behind] of all rows, or of one sequence; stands in graphs."""
    shape = torch.Size((rows.batch, rows.length, *behind))
    if asked == "numel":
        return shape.numel()
    if asked == "is_contiguous":
        return True
    return shape if asked is None else shape[asked]  # type: ignore[index]


def reshaped_rows(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return packed rows, each in another shape; `sizes` are those of the whole tensor; stands in graphs."""
    return x.reshape(*x.shape[:2], *sizes[2:])


def dropped_by(x: Tensor, rows: Rows, layer: Any) -> Tensor:
    """Return packed rows after a dropout layer, which draws as for all rows; stands in graphs."""
    if not layer.training or layer.p == 0:
        return x
    return packed_rows(layer(unpacked_rows(x, rows)), rows)


def dropped(rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return packed rows after torch's dropout, which draws as for all rows; stands in graphs."""
    p = args[0] if args else kwargs.get("p", 0.5)
    training = args[1] if len(args) > 1 else kwargs.get("training", True)
    if not training or p == 0:
        return x
    return packed_rows(torch.nn.functional.dropout(unpacked_rows(x, rows), *args, **kwargs), rows)


def shown_rows(x: Tensor, call: Any, leaf: int) -> Any:
    """Return packed rows as the caller of the block shall see them; stands in graphs."""
    return call.show(x, leaf)
