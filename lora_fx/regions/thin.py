"""Runs that only show what a model's blocks are called with: what nobody learns from is not computed.

Large products are thin: shapes, dtypes, strides, errors and the path of gradients are those of the real product, the
values those of its first few input features.  A call that has been answered in the same run, of the same kind of block
with the same facts, is answered alike.  A block of which something is still to be compared or captured computes all.
"""

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_fx.models.torch_internals import function_modes, pytree, without_function_mode

_FEATURES = 4
"""How many of its input's features a thin linear multiplies: enough for values that differ from row to row."""
SMALLEST = 1 << 18
"""Entries that a weight has at the least for its product to become thin; less is not worth a thought."""


class Purpose(enum.Enum):
    """What for a model is run on a sample."""

    RESULT = "its result: everything is computed"
    SHOW = "what its blocks are called with: of blocks of one kind the first are compared with their graphs"
    PROVE = "the same, and every block is compared"
    FLOW = "where gradients come to: they pass through every block"


class ThinLinears(TorchFunctionMode):
    """Lets products of rows by a large weight take only the first few features of the rows, in this thread.

    What a run is for decides on what else is left out.
    """

    def __init__(self, purpose: Purpose) -> None:
        super().__init__()
        self.paused = False
        self.purpose = purpose
        self._answers: dict[Any, Any] = {}

    def once(self, key: object, answer: Callable[[], Any]) -> Any:
        """Return the answer, or a copy of the one that was given to the key before."""
        if self.purpose is Purpose.FLOW:
            return answer()
        if key not in self._answers:
            self._answers[key] = answer()
        given = self._answers[key]
        return given.clone() if type(given) is Tensor else pytree.tree_map_only(Tensor, torch.clone, given)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        cut = _CUTS.get(func)
        if cut is not None:
            args = cut(*args)
        return func(*args, **kwargs) if kwargs else func(*args)

    def unseen(self) -> AbstractContextManager[None]:
        """Return a context in which this thread's functions do not pass through here: most are questions about shapes.

        Only where no other mode was entered since.
        """
        modes = function_modes()
        return without_function_mode(self) if modes and modes[-1] is self else nullcontext()

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
    return (x, weight, *rest) if weight is not None else () if x is None else (x,)


def _cut_addmm(bias: Any = None, x: Any = None, weight: Any = None, *rest: Any) -> tuple[Any, ...]:
    if _is_large(weight) and _fits(x, weight.shape[0]):
        return (bias, x[:, :_FEATURES], weight[:_FEATURES], *rest)
    return (bias, x, weight, *rest) if weight is not None else tuple(given for given in (bias, x) if given is not None)


_CUTS: dict[Any, Callable[..., tuple[Any, ...]]] = {F.linear: _cut_linear, torch.addmm: _cut_addmm}


def _is_large(weight: Any) -> bool:
    # subclasses (quantised, sharded) know themselves what their product is
    return type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() >= SMALLEST


def _fits(x: Any, features: int) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dim() > 0 and x.shape[-1] == features
