"""What passes know of single operations: which draw and write nothing, and what autograd keeps for which."""

import operator
from collections.abc import Iterator

from torch import fx

from lora_fx.adapters.rawweight.products import VIEWS, name_of
from lora_fx.models.parts import into_parts
from lora_fx.passes.flatten import adapted_output

_CASTS = frozenset({"to", "type_as", "float", "half", "bfloat16", "double", "contiguous"})
_INTO_PARTS = into_parts.__name__
_KEEP_NOTHING = frozenset({"add", "sub", "neg", "mean", "sum", "rsub", _INTO_PARTS})
_KEEP_OPERANDS = frozenset(
    {"mul", "pow", "square", "div", "true_divide", "silu", "gelu", "softplus", "abs", "sin", "cos", "log", "erf",
     "leaky_relu", "elu", "hardswish", "mish", "layer_norm", "rms_norm", "relu6", "clamp", "rsub"}
)  # fmt: skip
_KEEP_RESULT = frozenset({"relu", "tanh", "exp", "rsqrt", "sqrt", "sigmoid", "reciprocal"})
_SERIES = frozenset(
    {"tanh", "erf", "exp", "sigmoid", "silu", "gelu", "softplus", "mish", "elu", "log", "sin", "cos"}
)  # fmt: skip
"""Operations that cost several times what reading and writing their numbers does."""
_REPEATABLE = _CASTS | _KEEP_NOTHING | _KEEP_OPERANDS | _KEEP_RESULT
_QUIET = (
    _REPEATABLE | VIEWS
    | {"size", "getitem", "cat", "stack", "linear", "matmul", "mm", "bmm", "softmax", "getattr", "mod", "floordiv",
     "packed_rows", "unpacked_rows", "whole_size", "reshaped_rows"}
)  # fmt: skip
DUNDERS = {"__mul__": "mul", "__rmul__": "mul", "__add__": "add", "__radd__": "add", "__sub__": "sub",
            "__truediv__": "div", "__pow__": "pow", "__neg__": "neg", "truediv": "div"}  # fmt: skip
"""What operators are called as functions."""


def operation(node: fx.Node) -> str:
    """Return the name of what a node calls, alike for functions, methods and operators; "" for no such call."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = "getitem" if node.target is operator.getitem else name_of(node.target)
    else:
        return ""
    return DUNDERS.get(name, name)


def is_quiet(node: fx.Node) -> bool:
    """Whether it is known to draw no random numbers, to write nothing in place and to read no global state."""
    if node.op in ("placeholder", "get_attr", "output") or node.target is adapted_output:
        return True
    return operation(node) in _QUIET and not _is_in_place(node)


def is_repeatable(node: fx.Node) -> bool:
    """Whether running it twice costs little and gives the same: entry by entry, or along a row."""
    return operation(node) in _REPEATABLE and not _is_in_place(node)


def _is_in_place(node: fx.Node) -> bool:
    return bool(node.kwargs.get("inplace")) or "out" in node.kwargs or (
        operation(node) in ("relu", "silu", "relu6", "elu", "leaky_relu", "hardswish", "mish") and True in node.args
    )  # fmt: skip


def kept_by_autograd(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the tensors that torch keeps for the backward pass of a repeatable operation, frozen parameters apart."""
    name, operands = operation(node), [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
    if name in _KEEP_RESULT:
        yield node
    elif name == "mul" and len(node.all_input_nodes) < 2:
        return  # by a number
    elif name in ("mul", "div") and len(operands) < len(node.all_input_nodes):
        return  # by a frozen parameter
    elif name in _KEEP_OPERANDS:
        yield from operands


def work_of(node: fx.Node) -> int:
    """Return what computing the result takes, for comparisons: 1 for a pass over its bytes."""
    name = operation(node)
    if is_alias(node):
        return 0
    if name in _SERIES or (name == "pow" and 2 not in node.args):
        return 6
    return 3 if name in ("layer_norm", "rms_norm") else 1


def is_alias(node: fx.Node) -> bool:
    """Whether the result is its operand itself, or a view of it: a cast to the dtype that it has."""
    name = operation(node)
    if name in VIEWS or name == _INTO_PARTS:
        return True
    return name in _CASTS - {"contiguous"} and _dtype(node) is not None and _dtype(node) == _dtype(node.args[0])


def _dtype(node: object) -> object:
    return node.meta["tensor"][1] if isinstance(node, fx.Node) and "tensor" in node.meta else None


def bytes_of(node: fx.Node) -> int:
    """Return the size of a node's tensor as it was captured; 0 if unknown."""
    number: int = node.meta.get("bytes", 0)
    return number
