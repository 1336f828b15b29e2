"""The torch functions that multiply something by a weight, and what a low-rank weight makes of each.

Operands may be tensors or proxies that write a graph: nothing here looks at their values.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.rawweight.factored import Factored, Operand
from lora_fx.models.torch_internals import OpOverload

Delta = Callable[[Factored, Callable[[Operand], Operand]], Operand | None]
"""From the low-rank part of the weight, and what is done to the other operand before, to the low-rank product."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a torch function, one operand of which is the weight."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    weight: Any

    def operand(self, index: int, *names: str) -> Any:
        """Return an argument by its position or any of its names; None if it is not given."""
        if index < len(self.args):
            return self.args[index]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)


def name_of(function: Any) -> str:
    """Return the name of a torch function, method, operator or overload: `linear`, `matmul`."""
    if isinstance(function, str):
        return function
    if isinstance(function, OpOverload):
        function = function.overloadpacket
    name: str = getattr(function, "__name__", "")
    return name.rsplit(".", 1)[-1]


def product(name: str, call: Call) -> Delta | None:
    """Return how a call multiplies its weight; None if it is not a product known here, or not by this operand."""
    multiply = _PRODUCTS.get(name)
    return None if multiply is None else multiply(call)


def _linear(call: Call) -> Delta | None:
    x, weight = call.operand(0, "input"), call.operand(1, "weight")
    if weight is not call.weight or x is call.weight:
        return None
    return lambda low, given: low.linear(given(x))


def _matmul(call: Call) -> Delta | None:
    left, right = call.operand(0, "input", "mat1", "self"), call.operand(1, "other", "mat2", "vec", "tensor2")
    return _either(call, left, right)


def _either(call: Call, left: Any, right: Any, factor: Any = 1) -> Delta | None:
    if (left is call.weight) == (right is call.weight):
        return None
    if right is call.weight:
        return lambda low, given: _times(low.matmul(given(left)), factor)
    return lambda low, given: _times(low.rmatmul(given(right)), factor)


def _times(result: Operand | None, factor: Any) -> Operand | None:
    return result if result is None or (isinstance(factor, (int, float)) and factor == 1) else result * factor


def _add_product(call: Call) -> Delta | None:
    alpha = call.kwargs.get("alpha", 1)
    return _either(call, call.operand(1, "mat1", "batch1"), call.operand(2, "mat2", "batch2", "vec"), alpha)


def _einsum(call: Call) -> Delta | None:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    positions = [index for index, operand in enumerate(operands) if operand is call.weight]
    if not isinstance(equation, str) or len(operands) != 2 or len(positions) != 1:
        return None
    position = positions[0]
    return lambda low, given: low.einsum(equation, position, given(operands[1 - position]))


def _embedding(call: Call) -> Delta | None:
    ids, weight = call.operand(0, "input"), call.operand(1, "weight")
    if ids is call.weight:  # aten's own takes the weight first
        ids, padding = weight, None
    elif weight is call.weight and call.operand(3, "max_norm") is None:
        padding = call.operand(2, "padding_idx")
    else:
        return None
    return lambda low, given: given(low.embedding(ids, padding_idx=padding))


def _convolution(convolve: Callable[..., Operand]) -> Callable[[Call], Delta | None]:
    def delta(call: Call) -> Delta | None:
        x, weight = call.operand(0, "input"), call.operand(1, "weight")
        if weight is not call.weight or x is call.weight:
            return None
        stride, padding, dilation = call.operand(3, "stride"), call.operand(4, "padding"), call.operand(5, "dilation")
        groups = call.operand(6, "groups") or 1
        settings = (stride or 1, padding or 0, dilation or 1)
        return lambda low, given: low.convolution(given(x), convolve, groups, settings)

    return delta


def _grouped(call: Call) -> Delta | None:
    x, weight, offsets = call.operand(0, "input", "mat_a"), call.operand(1, "weight", "mat_b"), call.operand(2, "offs")
    if weight is not call.weight or offsets is None:
        return None
    return lambda low, given: low.grouped(given(x), offsets, grouped_product)


def grouped_product(x: Tensor, bank: Tensor, offsets: Tensor) -> Tensor:
    """Return rows of x [S, in], in groups that end at `offsets` [E], each times its matrix of the bank [E, in, out]."""
    ends = [0, *offsets.tolist()]
    parts = [x[a:b] @ bank[e] for e, (a, b) in enumerate(itertools.pairwise(ends)) if b > a]
    rest = x.new_zeros(x.shape[0] - ends[-1], bank.shape[-1])
    return torch.cat([*parts, rest])


GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_PRODUCTS: dict[str, Callable[[Call], Delta | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": lambda call: _either(call, call.operand(1, "other"), call.operand(0, "input")),
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "addmm": _add_product,
    "addmv": _add_product,
    "baddbmm": _add_product,
    "einsum": _einsum,
    "embedding": _embedding,
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "conv3d": _convolution(F.conv3d),
    **dict.fromkeys(GROUPED, _grouped),
}

VIEWS = frozenset(
    {"t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "view", "reshape",
     "__getitem__", "getitem", "narrow", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind",
     "unsqueeze", "squeeze", "flatten", "unflatten", "expand"}
)  # fmt: skip
"""Operations that show a weight in another way; which entries they show is asked of torch itself."""
COPIES = frozenset(["to", "type_as", "type", "float", "half", "bfloat16", "double", "contiguous", "clone"])
"""Operations that leave every entry in its place."""
