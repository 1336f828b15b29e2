"""Writes torch calls into a torch.fx.Graph: which node made which tensor, and which expression is which size."""

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from lora_fx.capture.calls.arguments import CONSTANTS
from lora_fx.capture.calls.objects import Undo
from lora_fx.capture.calls.reasons import Untraceable
from lora_fx.capture.reads.opennumbers import refuse_open
from lora_fx.capture.tracing.proxies import is_proxy
from lora_fx.models.torch_internals import (
    FakeTensor,
    constant_of,
    hint_of,
    is_functorch_wrapper,
    pytree,
    symbol_of,
    write_expression,
)

TRANSFORMED = "the forward uses a functorch transform (vmap, grad)"
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(slots=True)
class GraphWriter:
    """The graph so far, and where its values come from."""

    module: nn.Module
    graph: fx.Graph = field(default_factory=fx.Graph)
    made_by: dict[int, fx.Node] = field(default_factory=dict)
    owned: dict[int, str] = field(default_factory=dict)
    """Dotted path of the parameters, buffers and tensor attributes of the module, by identity."""
    attributes: dict[str, fx.Node] = field(default_factory=dict)
    sizes: dict[sympy.Expr, fx.Node] = field(default_factory=dict)
    size_of: dict[sympy.Symbol, tuple[fx.Node, int | None]] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    """Keeps tensors alive, since values are compared by identity."""
    inputs: dict[int, fx.Node] = field(default_factory=dict)
    """The graph's inputs, by the identity of what stands for them in the capture."""
    ask_object: Callable[[Any], fx.Node] | None = None
    """Makes an input of a proxy that the graph mentions."""
    place: str = ""
    """Path of the submodule whose forward is running."""

    def __post_init__(self) -> None:
        for name, tensor in (*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers()):
            self.owned.setdefault(id(tensor), name)
        for path, module in self.module.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    self.owned.setdefault(id(value), f"{path}.{name}".lstrip("."))

    def input(self, name: str, stand_in: Any) -> fx.Node:
        """Add an input, also amid a capture; return its node; symbolic sizes of a fake are then at hand."""
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first) if first is not None else contextlib.nullcontext():
            node = self.graph.placeholder(name)
        node.target = node.name  # which the graph makes unique and an identifier; inputs go by position
        self.inputs[id(stand_in)] = node
        self.alive.append(stand_in)
        if isinstance(stand_in, Tensor):
            node.meta.update(_facts_of(stand_in))
            for dim, size in enumerate(stand_in.shape):
                if isinstance(size, torch.SymInt) and symbol_of(size).is_symbol:
                    self.size_of.setdefault(symbol_of(size), (node, dim))
        elif isinstance(stand_in, torch.SymInt):
            self.size_of.setdefault(symbol_of(stand_in), (node, None))
        return node

    def emit(self, op: str, target: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        """Return a new node at the end of the graph, marked with the submodule whose forward is running."""
        node = self.graph.create_node(op, target, tuple(args), kwargs or {})
        node.meta["place"] = self.place
        return node

    def made(self, value: Any, node: fx.Node) -> None:
        """Remember that `node` made `value` (a tensor, or a tuple, list or dict with tensors)."""
        if isinstance(value, Tensor):
            self.made_by[id(value)] = node
            self.alive.append(value)
            node.meta.update(_facts_of(value))
        elif isinstance(value, (tuple, list, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if holds_tensor(item):
                    self.made(item, self.emit("call_function", operator.getitem, (node, key)))
        elif not isinstance(value, (*CONSTANTS, *_SYMBOLIC)):
            raise Untraceable(f"a call returns an object of type {type(value).__name__}")

    def is_known(self, value: Any) -> bool:
        """Whether the value is a tensor that the graph has already."""
        return isinstance(value, Tensor) and any(
            id(value) in table for table in (self.made_by, self.inputs, self.owned)
        )

    def argument(self, value: Any) -> Any:
        """Return the value as a node's argument: tensors and symbolic sizes become the nodes that make them.

        Raises:
            Untraceable: nothing in the graph makes the value, and it is not a constant.
        """
        if isinstance(value, Tensor):
            return self._tensor(value)
        refuse_open(value)
        if id(value) in self.inputs:
            return self.inputs[id(value)]
        if is_proxy(value):
            assert self.ask_object is not None
            return self.ask_object(value)
        if isinstance(value, _SYMBOLIC):
            constant = constant_of(value)
            return constant if constant is not None else self._expression(symbol_of(value))
        if isinstance(value, dict):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, (tuple, list)):
            return _sequence(value, [self.argument(item) for item in value])
        if isinstance(value, (*CONSTANTS, range)):
            return value
        raise Untraceable(f"a torch function is given an object of type {type(value).__name__}")

    def _tensor(self, value: Tensor) -> fx.Node:
        # a call may return its own argument (`contiguous`): what made a tensor last stands before what gave it
        node = self.made_by.get(id(value), self.inputs.get(id(value)))
        if node is not None:
            return node
        name = self.owned.get(id(value))
        if name is not None:
            return self.attribute(name)
        if isinstance(value, FakeTensor):
            raise Untraceable("a tensor comes from an operation that torch does not show")
        if is_functorch_wrapper(value):
            raise Untraceable(TRANSFORMED)
        raise Untraceable("a tensor is neither an argument nor a parameter, buffer or attribute of the module")

    def attribute(self, name: str) -> fx.Node:
        """Return the node that gets the tensor of that dotted path from the module."""
        if name not in self.attributes:
            self.attributes[name] = self.emit("get_attr", name)
        return self.attributes[name]

    # a size among a node's arguments: `x.reshape(x.shape[0] * x.shape[1], -1)` asks for the product of two symbols, say
    # s0*s1.  The writer knows that s0 is dimension 0 of the input x, and s1 dimension 1 (`size_of`), and writes
    #
    #     size = x.size(0);  size_1 = x.size(1);  mul = operator.mul(size, size_1);  reshape = x.reshape(mul, -1)
    #
    # each expression once for the whole graph (`sizes`).  A symbol that no input has comes from values: refused.

    def _expression(self, expression: sympy.Expr) -> fx.Node:
        if expression not in self.sizes:
            symbols = {symbol: self._symbol(symbol) for symbol in expression.free_symbols}
            known = symbols.get(expression)
            self.sizes[expression] = known or write_expression(self.graph, expression, symbols)
        return self.sizes[expression]

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol not in self.sizes:
            if symbol not in self.size_of:
                raise Untraceable("a size depends on the values of a tensor")
            node, dim = self.size_of[symbol]
            self.sizes[symbol] = node if dim is None else self.emit("call_method", "size", (node, dim))
        return self.sizes[symbol]

    def writes_in_place(self) -> bool:
        """Whether a statement so far writes to a tensor or an object instead of computing a new one."""
        return any(writes(node) for node in self.graph.nodes)

    def mark(self) -> Callable[[], None]:
        """Return a function that takes back everything written since."""
        nodes = set(self.graph.nodes)
        tables = Undo((self.made_by, self.attributes, self.sizes))

        def take_back() -> None:
            for node in reversed(list(self.graph.nodes)):
                if node not in nodes and node.op != "placeholder":
                    self.graph.erase_node(node)
            tables()

        return take_back

    def drop_unused(self) -> None:
        """Erase nodes without users that compute nothing but a view, a size or an attribute."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and _is_free(node):
                self.graph.erase_node(node)


def writes(node: fx.Node) -> bool:
    """Whether the statement writes to a tensor or an object instead of computing a new one."""
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name in ("setitem", "set_item", "set_attribute", "append_item") or (name[-1] == "_" != name[-2])


_FREE_METHODS = frozenset({"size", "view", "reshape", "transpose", "expand", "permute", "unsqueeze", "squeeze", "to"})


def _is_free(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _FREE_METHODS
    if node.op == "call_function":
        computes_size = "tensor" not in node.meta and "place" not in node.meta
        return node.target in (operator.getitem, getattr) or computes_size
    return node.op == "get_attr"


def _facts_of(tensor: Tensor) -> dict[str, Any]:
    """Return what a node remembers of its tensor: sizes and dtype, and how many bytes it had when it was captured."""
    number = tensor.dtype.itemsize
    for size in tensor.shape:
        number *= size if isinstance(size, int) else hint_of(size) or _SOME
    return {"tensor": (tuple(map(str, tensor.shape)), tensor.dtype), "bytes": number}


_SOME = 64
"""What a size counts as that depends on data."""


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in the value, at any depth that torch's pytree sees."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _sequence(original: Any, items: list[Any]) -> Any:
    if isinstance(original, torch.Size):
        return tuple(items)
    if isinstance(original, tuple) and type(original) is not tuple:  # a named tuple
        return type(original)(*items)
    return type(original)(items)
