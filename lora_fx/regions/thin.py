"""Thin linears: while a model runs only to show what its blocks are called with, no large product is computed whole.

Shapes, dtypes, strides, errors and the path of gradients are those of the real product; the values are those of its
first few input features.  A block of which something is still to be compared or captured computes all of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_fx.models.torch_internals import without_function_mode

_FEATURES = 4
"""How many of its input's features a thin linear multiplies: enough for values that differ from row to row."""
SMALLEST = 1 << 18
"""Entries that a weight has at the least for its product to become thin; less is not worth a thought."""


class ThinLinears(TorchFunctionMode):
    """Lets products of rows by a large weight take only the first few features of the rows, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        cut = _CUTS.get(func)
        return func(*(cut(*args) if cut is not None else args), **kwargs)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Compute everything for a while."""
        self.paused = True
        try:
            with without_function_mode(self):
                yield
        finally:
            self.paused = False


def _cut_linear(x: Any = None, weight: Any = None, *rest: Any) -> tuple[Any, ...]:
    if _is_large(weight) and _fits(x, weight.shape[1]):
        return (x[..., :_FEATURES], weight[:, :_FEATURES], *rest)
    return tuple(given for given in (x, weight) if given is not None) + rest


def _cut_addmm(bias: Any = None, x: Any = None, weight: Any = None, *rest: Any) -> tuple[Any, ...]:
    if _is_large(weight) and _fits(x, weight.shape[0]):
        return (bias, x[:, :_FEATURES], weight[:_FEATURES], *rest)
    return tuple(given for given in (bias, x, weight) if given is not None) + rest


_CUTS: dict[Any, Callable[..., tuple[Any, ...]]] = {F.linear: _cut_linear, torch.addmm: _cut_addmm}


def _is_large(weight: Any) -> bool:
    # subclasses (quantised, sharded) know themselves what their product is
    return type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() >= SMALLEST


def _fits(x: Any, features: int) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dim() > 0 and x.shape[-1] == features
