"""What the nodes of a graph do: one name for the function, operator, method and aten operation of one kind."""

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.models.layers import has_hooks, kind_of
from lora_fx.models.swap import is_swapped
from lora_fx.planning.sites import CONVOLUTIONS

_ALIASES = {
    **dict.fromkeys(("mm", "imatmul", "__matmul__"), "matmul"),
    **dict.fromkeys(("iadd", "add_", "__add__"), "add"),
    **dict.fromkeys(("isub", "sub_", "subtract"), "sub"),
    **dict.fromkeys(("imul", "mul_", "multiply"), "mul"),
    **dict.fromkeys(("truediv", "itruediv", "true_divide", "divide", "div_"), "div"),
    **dict.fromkeys(("reshape", "_unsafe_view"), "view"),
    **dict.fromkeys(("t", "numpy_T", "mT", "matrix_H", "swapaxes", "adjoint"), "transpose"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("index_put", "index_put_"), "setitem"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "conv"),
    "negative": "neg",
    "split_with_sizes": "split",
    "alpha_dropout": "dropout",
}
"""Other names of operations."""
_NAMES_OF_IDENTITIES = (
    "contiguous clone detach alias lift_fresh_copy requires_grad_ to type type_as float double half bfloat16 "
    "_to_copy cpu"
)
_IDENTITIES = frozenset(_NAMES_OF_IDENTITIES.split())
IDENTITY = "identity"
"""What gives the values of its argument: copies, casts, a dropout that drops nothing."""
_NAMES = (
    "linear addmm matmul add sub mul div neg view transpose permute unsqueeze squeeze flatten getitem slice narrow "
    "chunk split cat new_zeros zeros zeros_like setitem dropout size shape"
)
_KNOWN = {*_NAMES.split(), *_ALIASES, *_IDENTITIES}
_IN_PLACE = {"iadd", "add_", "isub", "sub_", "imul", "mul_", "itruediv", "div_", "setitem", "index_put_", "copy_"}
_PLACES: tuple[Any, ...] = (F, torch, operator, torch.Tensor)
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation")
_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("input", "mat1", "mat2"),
    **dict.fromkeys(("matmul", "add", "sub", "mul", "div"), ("input", "other")),
    "dropout": ("input", "p", "training"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("input", "split_size", "dim"),
    "narrow": ("input", "dim", "start", "length"),
    "slice": ("input", "dim", "start", "end", "step"),
    "cat": ("tensors", "dim"),
    "transpose": ("input", "dim0", "dim1"),
    "unsqueeze": ("input", "dim"),
    "squeeze": ("input", "dim"),
    "conv": (*_CONVOLUTION, "groups"),
    "convolution": (*_CONVOLUTION, "transposed", "output_padding", "groups"),
    "flatten": ("input", "start_dim", "end_dim"),
    "getitem": ("input", "index"),
}
_SYNONYMS = {
    "self": "input", "x": "input", "split_size_or_sections": "split_size", "split_sizes": "split_size", "axis": "dim",
    "mat2": "other", "train": "training",
}  # fmt: skip
_NAMES_OF_VIEWS = "view getitem slice narrow chunk split transpose permute unsqueeze squeeze select data"
VIEWS = frozenset(_NAMES_OF_VIEWS.split())
"""What may give its argument's own memory."""


class NotLinear(Exception):
    """A value that is not an affine function of what was asked for, or not a product: why, and `node`, where."""

    def __init__(self, node: fx.Node | None, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass(frozen=True, slots=True)
class GraphCall:
    """A node, read: which operation, on what.  `arguments` are by the names of torch's documentation."""

    op: str
    node: fx.Node
    arguments: dict[str, Any]
    in_place: bool = False
    module: nn.Module | None = None

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


def _function_names() -> dict[Any, str]:
    """Return for each torch function its name here, by identity: a function of the user's may have the same name."""
    functions: dict[Any, str] = {}
    for place in _PLACES:
        for name in _KNOWN:
            function = vars(place).get(name)
            if isinstance(function, Callable):  # type: ignore[arg-type]
                functions.setdefault(function, name)
    return functions


_FUNCTIONS = _function_names()
_OVERLOAD = type(torch.ops.aten.linear.default)


def read_call(node: fx.Node, root: nn.Module) -> GraphCall:
    """Return what a call_function, call_method or call_module node does; an unknown operation bears its own name."""
    call = _call_as_written(node, root)
    is_inactive = call.op == "dropout" and (call.get("training", True) is False or call.get("p", 0.5) == 0)
    return replace(call, op=IDENTITY) if is_inactive else call


def _call_as_written(node: fx.Node, root: nn.Module) -> GraphCall:
    if node.op == "call_module":
        return _module_call(node, root.get_submodule(str(node.target)))
    name = _raw_name(node)
    if name == "getattr":
        return _attribute(node)
    op = IDENTITY if name in _IDENTITIES else _ALIASES.get(name, name)
    return GraphCall(op, node, _named(name if name in _ARGUMENTS else op, node), name in _IN_PLACE)


def _raw_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, _OVERLOAD):
        return str(target.overloadpacket.__name__) if target.namespace == "aten" else str(target)
    if target is getattr:
        return "getattr"
    known = _FUNCTIONS.get(target)
    return known if known is not None else f"{target.__module__}.{target.__name__}"


def is_assertion(node: fx.Node) -> bool:
    """Whether the node only checks a tensor's dtype and device, as torch.export has it before every cast."""
    return node.op == "call_function" and _raw_name(node) == "_assert_tensor_metadata"


def _attribute(node: fx.Node) -> GraphCall:
    name = str(node.args[1])
    op = {"T": "transpose", "mT": "transpose", "H": "transpose", "data": IDENTITY, "shape": "shape"}.get(name, name)
    return GraphCall(op, node, {"input": node.args[0]})


def _named(op: str, node: fx.Node) -> dict[str, Any]:
    names = _ARGUMENTS.get(op, ("input",))
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False))
    arguments["rest"] = node.args[len(names) :]
    return arguments | {key if key in names else _SYNONYMS.get(key, key): node.kwargs[key] for key in node.kwargs}


def _module_call(node: fx.Node, module: nn.Module) -> GraphCall:
    """Return a call of a module as the function that it is, if it is one and nothing else."""
    value = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    plain = GraphCall(f"module {type(module).__name__}", node, {"input": value}, module=module)
    if has_hooks(module) or "forward" in vars(module) or len(node.args) + len(node.kwargs) != 1:
        return plain
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
        return replace(plain, op="dropout", arguments={"input": value, "p": module.p, "training": module.training})
    if type(module) is nn.Identity:
        return replace(plain, op=IDENTITY)
    if is_convolution(module):
        settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        return replace(plain, op="conv", arguments={"input": value, **settings})
    return replace(plain, op="linear") if is_linear(module) else plain


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x · weightᵀ + bias (x · weight + bias) and nothing else, with its own parameters."""
    own = type(module).forward is nn.Linear.forward or stores_transposed(module)
    if type(module) is not LoRAFactor and not own:
        return False
    computed = inspect.getattr_static(type(module), "weight", None)
    return module._parameters.get("weight") is not None and not isinstance(computed, property)


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is one of torch's convolutions and nothing else, with its own parameters."""
    kind = kind_of(module)
    known = kind is not None and kind.op in CONVOLUTIONS and kind.called and kind.refusal is None
    return known and not is_swapped(type(module))


def stores_transposed(module: nn.Module) -> bool:
    """Whether the module is a linear that holds its weight as [in, out]: transformers' Conv1D."""
    kind = kind_of(module)
    known = kind is not None and kind.op == "linear" and kind.layout == "in_out" and kind.called
    return known and not is_swapped(type(module))


def parameters_read(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what a call of the module may read: a linear's own parameters, everything in any other module."""
    yield from module.named_parameters(recurse=not is_linear(module), remove_duplicate=False)
