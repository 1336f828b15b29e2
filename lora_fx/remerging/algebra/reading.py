"""A graph read as mathematics: each value as an affine function of another one, each constant as a sum of chains."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import networkx as nx
from torch import Tensor, fx, nn

from lora_fx.models.tensors import attribute_at
from lora_fx.passes.dataflow import dataflow
from lora_fx.remerging.algebra.chains import Affine, Matrix, WeightPart, matrix
from lora_fx.remerging.algebra.convolutions import Patches
from lora_fx.remerging.algebra.operations import IDENTITY, VIEWS, GraphCall, NotLinear, is_assertion, read_call
from lora_fx.remerging.algebra.shapes import last_dimension, shape_of

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Operations:
    """What is known of the operations in graphs, by name; `read.py` has the tables."""

    affine: "Mapping[str, Callable[[GraphReading, GraphCall, fx.Node, int], Affine]]"
    """(reading, call, x, columns of x) → its value as an affine function of x."""
    constant: "Mapping[str, Callable[[GraphReading, GraphCall], Matrix | None]]"
    """(reading, call) → its value, which depends on parameters alone; None if that is not a sum of products."""


@dataclass(slots=True)
class GraphReading:
    """What is known of a graph, worked out on demand; neither graph nor tensors are changed."""

    root: nn.Module
    graph: fx.Graph
    operations: Operations
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of tensors by identity, where the graph's own names are unusable."""
    order: dict[fx.Node, int] = field(default_factory=dict)
    writes: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    """For each node, the statements that write to its value in place, in order."""
    spoilt: set[fx.Node] = field(default_factory=set)
    """Nodes to a part of whose value something is written through a view."""
    flow: nx.DiGraph = field(default_factory=nx.DiGraph)
    """Who reads whose value."""
    calls: dict[fx.Node, GraphCall] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The stored tensors that have been read, by name."""
    _constants: dict[fx.Node, Matrix | NotLinear | None] = field(default_factory=dict)
    _affine: dict[tuple[fx.Node, fx.Node, int], Affine | NotLinear] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stored = (*self.root.named_parameters(), *self.root.named_buffers())
        own = {id(tensor): name for name, tensor in reversed(stored)}  # of a tied tensor, the first name
        self.names = own | dict(self.names)
        for index, node in enumerate(self.graph.nodes):
            self.order[node] = index
            if node.op.startswith("call_"):
                self.calls[node] = call = read_call(node, self.root)
                if call.in_place:
                    self._note_write(node)
        self.flow = dataflow(self.graph, self.latest)
        self.flow.remove_edges_from(list(self.flow.in_edges(filter(is_assertion, self.graph.nodes))))
        for node in self.graph.nodes:  # in order, so that no recursion goes deep
            self.is_constant(node)

    # -- who makes and who reads a value

    def _root(self, node: fx.Node) -> fx.Node:
        """Return the node whose value the statement writes to; itself, if it makes a new one."""
        while node in self.calls and self.calls[node].in_place:
            node = self.calls[node].arguments["input"]
        return node

    def _note_write(self, node: fx.Node) -> None:
        root = self._root(node)
        self.writes.setdefault(root, []).append(node)
        call = self.calls.get(root)
        while call is not None and call.op in VIEWS and isinstance(call.get("input"), fx.Node):
            root = self._root(call.arguments["input"])
            self.spoilt.add(root)
            call = self.calls.get(root)

    def latest(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Return the statement that made the value which `reader` finds in `node`: writes in place come before."""
        root = self._root(node)
        before = [write for write in self.writes.get(root, ()) if self.order[write] < self.order[reader]]
        return before[-1] if before else root

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that read the value which this statement makes."""
        return [reader for reader, edge in self.flow[node].items() if edge["times"]]

    def times_read(self, node: fx.Node, reader: fx.Node) -> int:
        """Return how often a node reads a value: y + y reads it twice."""
        times: int = self.flow.edges[node, reader]["times"] if self.flow.has_edge(node, reader) else 0
        return times

    def is_read_once(self, node: fx.Node) -> bool:
        """Whether one node reads the value, and once."""
        readers = self.readers(node)
        return len(readers) == 1 and self.times_read(node, readers[0]) == 1

    def given(self, call: GraphCall, name: str = "input") -> fx.Node:
        """Return the node whose value the call finds in an argument."""
        value = call.get(name)
        if not isinstance(value, fx.Node):
            raise NotLinear(call.node, f"{call.op} of {value!r}")
        return self.latest(value, call.node)

    def whole_of(self, call: GraphCall) -> GraphCall:
        """Return the chunk or split that an item is taken from; a call that takes a piece by itself is its own."""
        source = call.get("input")
        if call.op == "getitem" and isinstance(source, fx.Node):
            maker = self.calls.get(self.latest(source, call.node))
            if maker is not None and maker.op in ("chunk", "split"):
                return maker
        return call

    # -- constants

    def constant(self, node: fx.Node) -> Matrix | None:
        """Return the value of a node that depends on parameters alone; None if it depends on an input.

        Raises:
            NotLinear: it depends on parameters alone, but is not a sum of products of them.
        """
        return _remembered(self._constants, node, lambda: self._constant(node))

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value depends on parameters alone, a sum of products or not."""
        try:
            return self.constant(node) is not None
        except NotLinear:
            return True

    def _constant(self, node: fx.Node) -> Matrix | None:
        if node.op == "get_attr":
            return self.leaf(str(node.target), node)
        call = self.calls.get(node)
        if call is None:
            return None
        if not node.all_input_nodes:
            raise NotLinear(node, f"{call.op} is not a product of parameters")
        if not all(self.is_constant(self.latest(source, node)) for source in node.all_input_nodes):
            return None
        operation = self.operations.constant.get(call.op)
        result = None if operation is None else operation(self, call)
        if result is None:
            raise NotLinear(node, _reason(call, f"{call.op} of parameters is not a product of them"))
        return result

    def leaf(self, name: str, node: fx.Node) -> Matrix:
        """Return a stored tensor as a constant."""
        tensor = attribute_at(self.root, name)
        if not isinstance(tensor, Tensor):
            raise NotLinear(node, f"{name} is not a tensor")
        known = self.names.get(id(tensor), name)
        self.tensors[known] = tensor
        part = WeightPart(known, False, 0, math.prod(tensor.shape[1:])) if tensor.dim() > 1 else None
        return matrix(tensor.detach(), (known,), part)

    def matrix_of(self, call: GraphCall, name: str = "input") -> Matrix:
        """Return an argument that is a constant.

        Raises:
            NotLinear: it depends on an input, or is not a sum of products.
        """
        value = self.constant(self.given(call, name))
        if value is None:
            raise NotLinear(call.node, f"{call.op} of two values that depend on the input")
        return value

    def number(self, value: object, call: GraphCall) -> float:
        """Return a scaling: a number, or a stored tensor of one element that is not trained.

        Raises:
            NotLinear: it is trained, depends on the input, or is not one number.
        """
        if isinstance(value, (int, float)):
            return float(value)
        if not isinstance(value, fx.Node):
            raise NotLinear(call.node, f"{call.op} by {value!r}")
        node = self.latest(value, call.node)
        try:
            constant = self.constant(node)
        except NotLinear as reason:
            known = reason.reason.startswith("the scaling")
            why = reason.reason if known else "the scaling is computed from parameters"
            raise NotLinear(call.node, why) from reason
        if constant is None:
            raise NotLinear(call.node, f"the scaling depends on the input ({node.name})")
        if any(isinstance(self.tensors[name], nn.Parameter) for name in constant.names):
            raise NotLinear(call.node, f"the scaling is a trained tensor ({', '.join(sorted(constant.names))})")
        single = constant.single
        if single is None or single.tensor.numel() != 1 or single.tensor.is_meta:
            raise NotLinear(call.node, f"the scaling is a tensor of shape {tuple(constant.shape)}")
        return float(single.tensor)

    # -- values that depend on an input

    def affine(self, node: fx.Node, x: fx.Node, width: int) -> Affine:
        """Return the value of `node` as an affine function of the value of `x`, [rows…, width] → [rows…, columns].

        Raises:
            NotLinear: with the first node on the way that is not one.
        """
        return _remembered(self._affine, (node, x, width), lambda: self._affine_of(node, x, width))

    def _affine_of(self, node: fx.Node, x: fx.Node, width: int) -> Affine:
        if node is x:
            shape = shape_of(x)
            return Affine.identity(width, "rows of the input" if shape is None else tuple(shape[:-1]))
        call = self.calls.get(node)
        if node in self.spoilt:
            raise NotLinear(node, f"a part of {node.name} is written in place")
        if call is None or self.order[node] < self.order[x]:
            raise NotLinear(node, f"its input is {node.name}, the linear's is {x.name}")
        operation = self.operations.affine.get(call.op)
        if operation is None:
            raise NotLinear(node, _reason(call, f"{_shown(call)} is not linear"))
        return operation(self, call, x, width)

    def argument(self, call: GraphCall, x: fx.Node, width: int, name: str = "input") -> Affine:
        """Return an argument of a call as `affine` does; what a convolution gives, where its columns do not matter."""
        value = self.affine(self.given(call, name), x, width)
        if isinstance(value.rows, Patches) and call.op not in ("conv", "neg", IDENTITY):
            raise NotLinear(call.node, f"{call.op} of what a convolution gives")
        return value

    def source(self, node: fx.Node, through: Collection[str] = (IDENTITY, "view")) -> fx.Node:
        """Return where a value comes from, through what changes neither values nor their order."""
        while True:
            call = self.calls.get(node)
            if call is None or node in self.spoilt or call.op not in through:
                return node
            if not isinstance(call.get("input"), fx.Node) or self.is_constant(node) or not _keeps_rows(call):
                return node
            node = self.given(call)


def _remembered(known: dict[_Key, _Value | NotLinear], key: _Key, compute: Callable[[], _Value]) -> _Value:
    """Return what is known of the key, computed the first time; a reason why there is nothing is raised again."""
    if key not in known:
        try:
            known[key] = compute()
        except NotLinear as reason:
            known[key] = reason
    value = known[key]
    if isinstance(value, NotLinear):
        raise value
    return value


def _reason(call: GraphCall, otherwise: str) -> str:
    """Return why an operation cannot be read; an active dropout has a reason of its own."""
    if call.op == "dropout":
        return f"dropout is active (p={call.get('p', 0.5)}); put the model into eval mode"
    return otherwise


def _shown(call: GraphCall) -> str:
    return call.op.rpartition(".")[2] if call.module is None else f"{call.op} ({call.node.target})"


def _keeps_rows(call: GraphCall) -> bool:
    """Whether a view keeps the last dimension, as far as its shapes are known."""
    if call.op != "view":
        return True
    before, after = shape_of(call.arguments["input"]), shape_of(call.node)
    if before is None or after is None:
        return last_dimension(call) is not None
    return before[-1] == after[-1]
