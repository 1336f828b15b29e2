"""What operations do to rows, the first two dimensions (batch, token) of a tensor: treat each apart, or mix them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from lora_fx.models.layers import has_hooks, linear_layout
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.pointwise import operation

Shape = Sequence[str]
ShapeOf = Callable[[fx.Node], Shape | None]
"""Gives the sizes of a node's tensor as text, equal where the sizes are; None if they are not known."""

ENTRY_BY_ENTRY = frozenset(
    {"add", "sub", "rsub", "mul", "div", "true_divide", "neg", "pow", "square", "abs", "exp", "log", "sqrt", "rsqrt",
     "reciprocal", "sin", "cos", "tanh", "erf", "sigmoid", "relu", "relu6", "gelu", "silu", "softplus", "elu", "mish",
     "leaky_relu", "hardswish", "clamp", "minimum", "maximum", "to", "type_as", "float", "half", "bfloat16", "double",
     "contiguous", "clone", "where", "masked_fill", "lerp", "addcmul", "dropout", "nan_to_num"}
)  # fmt: skip
ALONG_A_DIMENSION = frozenset(
    {"mean", "sum", "softmax", "log_softmax", "amax", "amin", "var", "norm", "cumsum", "logsumexp"}
)
SPLITS = frozenset({"split", "chunk", "tensor_split", "split_with_sizes", "unbind"})
ATTENTION = "scaled_dot_product_attention"
_MIXERS = frozenset(
    {"matmul", "bmm", "baddbmm", "einsum", "linear", "layer_norm", "rms_norm", "softmax", "cat", "stack", "getitem",
     "view", "reshape", "flatten", "unflatten", "transpose", "permute", "swapaxes", "movedim", "unsqueeze", "squeeze",
     "expand", "repeat_interleave", "t", "mT", "T", "narrow", "select", "expand_as", "view_as", "normalize",
     ATTENTION}
)  # fmt: skip
KNOWN = ENTRY_BY_ENTRY | ALONG_A_DIMENSION | SPLITS | _MIXERS
"""What may be computed from tensors with zeros in the place of padding: known to write nothing."""
QUESTIONS = frozenset({"size", "dim", "getattr", "numel", "ndimension", "is_contiguous"})
_MODULES = (nn.Identity, nn.Softplus, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.ReLU6, nn.Softmax)


def is_dropout(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the node is a dropout, which draws for every entry of the whole tensor."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return type(module) is nn.Dropout and not module.inplace and not has_hooks(module)
    return operation(node) == "dropout" and not node.kwargs.get("inplace") and len(node.args) < 4


def is_product(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the node multiplies each row by a matrix: what packing is for."""
    if node.target is adapted_output or operation(node) == "linear":
        return True
    if node.op != "call_module":
        return False
    module = graph_module.get_submodule(str(node.target))
    return linear_layout(type(module)) is not None and not has_hooks(module)


def is_known_module(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the node calls a module that computes entry by entry, or along the last dimension."""
    if node.op != "call_module":
        return False
    module = graph_module.get_submodule(str(node.target))
    return type(module) in _MODULES and not has_hooks(module) and not getattr(module, "inplace", False)


def keeps_rows_apart(node: fx.Node, dims: int) -> bool:
    """Whether an operation, on a tensor of so many dimensions, leaves its first two alone.

    Of an entry by entry operation, whose other operands decide, and of what reshapes, whose result does, it says yes.
    """
    name = operation(node)
    if name in ENTRY_BY_ENTRY or name in ("view", "reshape", "unflatten", "flatten"):
        return True
    if name in ALONG_A_DIMENSION:
        along = argument(node, 1, "dim")
        return _all_behind(along, dims)
    if name in SPLITS:
        return _all_behind(argument(node, 1 if name == "unbind" else 2, "dim", 0), dims)
    if name in ("layer_norm", "rms_norm"):
        return dims > 2
    if name in ("cat", "stack"):
        return name == "cat" and _all_behind(argument(node, 1, "dim", 0), dims)
    if name == "getitem":
        return _leaves_first_two(node.args[1], dims)
    if name == "transpose":
        return _all_behind(node.args[1:3], dims)
    return name == "unsqueeze" and _all_behind(argument(node, 1, "dim"), dims + 1)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call by its position or its name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _all_behind(along: Any, dims: int) -> bool:
    """Whether all dimensions of these come after the first two."""
    each = along if isinstance(along, (tuple, list)) else (along,)
    return bool(each) and all(type(dim) is int and 2 <= (dim + dims if dim < 0 else dim) < dims for dim in each)


def _leaves_first_two(index: Any, dims: int) -> bool:
    each = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, fx.Node) for item in each):
        return False
    if each and each[0] is Ellipsis:
        return sum(item is not None for item in each[1:]) <= dims - 2
    return len(each) >= 2 and each[0] == each[1] == slice(None) and Ellipsis not in each[2:]


def broadcasts(shape: Shape, result: Shape) -> bool:
    """Whether an operand of this shape is the same for all rows of a result."""
    behind = len(result) - 2
    return len(shape) <= behind or all(size == "1" for size in shape[: -behind or None])
