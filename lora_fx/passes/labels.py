"""labels: a block's rows are computed where somebody asks for them, but the keys and values of its attention, for all.

Which rows of a block's result are wanted is known only when a loss takes them.  From there back to where rows are mixed
a graph runs on these rows alone: output projection, MLP, norms, and in attention its queries; what they attend to, and
whatever else may mix rows, is computed for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.capture.captured import Captured
from lora_fx.capture.tracing.writer import writes
from lora_fx.liveness.asked import asked_rows, at_tokens, by_sequence, causal_at, one_after_the_other, size_with_all
from lora_fx.models.code import compiled
from lora_fx.models.torch_internals import pytree
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.onrows import reshaped_rows
from lora_fx.passes.pack import FIXED, MIXED, ROWS, NotPacked, Reading, sizes_of, spoken
from lora_fx.passes.pointwise import operation
from lora_fx.passes.rowwise import ATTENTION, QUESTIONS, SPLITS, argument, broadcasts, is_dropout, is_product
from lora_fx.passes.stack import draws
from lora_fx.passes.tokenaxis import aligned, token_axes

DRAWS = "the dropout of adapters draws for all rows at once"
_PRODUCTS = ("matmul", "bmm", ATTENTION)


@dataclass(frozen=True, slots=True)
class RowResult:
    """One of the results that are rows: its place among the leaves of all that is returned, and what is known of it."""

    place: int
    width: int
    dtype: Any


@dataclass(frozen=True, slots=True)
class Labels:
    """What is made of a block's graph to compute its rows where they are asked for."""

    early: Callable[..., Any]
    """Called with the module, the inputs and the call, whose `show` makes what stands for rows; gives the result."""
    late: fx.Graph
    """Of the inputs and `Asked`: the rows that are asked for of each of `leaves`, [1, N, width]."""
    leaves: tuple[RowResult, ...]
    hidden: int
    """Which of the inputs are the hidden states."""
    dropouts: tuple[str, ...]
    """Paths of dropouts, none of which may be on."""


class _Reading(Reading):
    """A reading in which what is not known is computed for all rows."""

    def of_unknown(self, node: fx.Node) -> str:
        if node.op == "call_module":
            raise NotPacked(f"{spoken(node)} is called whole")
        return MIXED


def labels_of(graph_module: fx.GraphModule, captured: Captured, title: str) -> Labels:
    """Return what computes the rows of a graph where they are asked for; the graph stays as it is.

    Raises:
        NotPacked: with what speaks against it, or that nothing would be left out.
    """
    nodes = graph_module.graph.nodes
    if any(writes(node) for node in nodes):
        raise NotPacked("it writes in place, or to a cache (pass use_cache=False)")
    if any(node.target is adapted_output and draws(node, graph_module) for node in nodes):
        raise NotPacked(DRAWS)
    if any(operation(node) == "dropout" and _may_drop(node) for node in nodes):
        raise NotPacked("its dropout draws for all rows at once")
    reading = _Reading(graph_module, captured)
    leaves = tuple(_leaves(reading))
    try:
        late = _Writing(reading, graph_module).late()
    except KeyError as missing:
        raise NotPacked(f"{missing} is read in a way that cannot be followed") from None
    paths = tuple(str(n.target) for n in nodes if n.op == "call_module" and is_dropout(n, graph_module))
    hidden = reading.placeholders.index(reading.hidden)
    return Labels(compiled(_early(reading, leaves), title), late, leaves, hidden, paths)


def _may_drop(dropout: fx.Node) -> bool:
    """Whether a call of torch's dropout may draw random numbers."""
    return argument(dropout, 1, "p", 0.5) != 0 and argument(dropout, 2, "training", True) is not False


def _leaves(reading: Reading) -> Iterator[RowResult]:
    """Yield the results that are rows.

    Raises:
        NotPacked: something else depends on the hidden states.
    """
    output = next(iter(reversed(reading.graph_module.graph.nodes)))
    for place, node in enumerate(pytree.tree_leaves(output.args[0])):
        if not isinstance(node, fx.Node) or reading.state[node] == FIXED:
            continue
        shape = reading.shape(node) or ()
        if not reading.leads(node) or len(shape) != 3 or not shape[2].isdigit():
            raise NotPacked(f"it returns {spoken(node)}, in which rows are mixed")
        yield RowResult(place, int(shape[2]), node.meta["tensor"][1])


def _early(reading: Reading, leaves: tuple[RowResult, ...]) -> fx.Graph:
    """Return the graph of what a call gives at once: what hidden states do not decide, and what stands for rows."""
    old, graph, made = reading.graph_module.graph, fx.Graph(), dict[fx.Node, fx.Node]()
    output = next(iter(reversed(old.nodes)))
    wanted = _ancestors(source for source in output.all_input_nodes if reading.state[source] == FIXED)
    for node in old.nodes:
        if node.op == "placeholder" or node in wanted:
            if reading.state[node] != FIXED and node is not reading.hidden:
                raise NotPacked("it returns what the shapes of its rows decide")
            made[node] = graph.node_copy(node, made.__getitem__)
    call = _placeholder(graph, "lora_fx_call")
    flat, structure = pytree.tree_flatten(output.args[0])
    shown = {leaf.place: number for number, leaf in enumerate(leaves)}
    flat = [
        graph.call_function(_shown, (call, shown[place])) if place in shown
        else made[value] if isinstance(value, fx.Node) else value
        for place, value in enumerate(flat)
    ]  # fmt: skip
    graph.output(pytree.tree_unflatten(flat, structure))
    return graph


def _shown(call: Any, number: int) -> Any:
    """Return what stands for rows; stands in graphs."""
    return call.show(number)


def _ancestors(nodes: Iterator[fx.Node]) -> set[fx.Node]:
    found, waiting = set[fx.Node](), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Return another placeholder, after those that there are."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.placeholder(name)


class _Writing:
    """Writes the graph of rows that are asked for: nodes for all rows, for the rows asked for, or for both."""

    def __init__(self, reading: Reading, graph_module: fx.GraphModule) -> None:
        self.reading = reading
        self.module = graph_module
        self.axes = token_axes(reading)
        self.output = next(iter(reversed(graph_module.graph.nodes)))
        self.whole_needed: set[fx.Node] = {reading.hidden}
        self.late_needed: set[fx.Node] = set()
        self.graph = fx.Graph()
        self.fixed: dict[fx.Node, fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.some: dict[fx.Node, fx.Node] = {}
        """Of ROWS the form one after the other, of MIXED that by sequence."""

    def late(self) -> fx.Graph:
        self._decide()
        rows = [node for node in self.late_needed if self._is_late(node) and is_product(node, self.module)]
        if not rows:
            raise NotPacked("no linear in it is left to single rows")
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self._given(node)
        self.asked = _placeholder(self.graph, "lora_fx_asked")
        for node in self.module.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._write(node)
        results = [n for n in pytree.tree_leaves(self.output.args[0]) if isinstance(n, fx.Node) and self._varies(n)]
        self.graph.output(tuple(self._rows(node) for node in results))
        for made in reversed(list(self.graph.nodes)):
            if not made.users and made.op not in ("placeholder", "output"):
                self.graph.erase_node(made)
        return self.graph

    def _varies(self, node: fx.Node) -> bool:
        return self.reading.state[node] != FIXED

    # -- what is needed, and of which rows

    def _decide(self) -> None:
        """Note which nodes are needed for all rows, and which for some; users come before what they use."""
        questions: set[fx.Node] = set()
        for node in reversed(self.module.graph.nodes):
            if not self._varies(node):
                if operation(node) in QUESTIONS:
                    questions.update(filter(self._varies, node.all_input_nodes))
                continue
            if node in questions and not (node in self.whole_needed or node in self.late_needed):
                (self.late_needed if node in self.axes else self.whole_needed).add(node)
            if node is self.output:
                for source in filter(self._varies, node.all_input_nodes):
                    self._need_rows(source)
            elif node in self.whole_needed and not (node in self.late_needed and operation(node) in SPLITS):
                self.whole_needed.update(filter(self._varies, node.all_input_nodes))
            elif node in self.late_needed:
                if node in self.whole_needed:
                    self.whole_needed.update(filter(self._varies, node.all_input_nodes))
                self._need_of(node)

    def _need_rows(self, node: fx.Node) -> None:
        """Note that rows of a node are needed, one after the other."""
        (self.late_needed if self.axes.get(node) == 1 else self.whole_needed).add(node)

    def _need_of(self, node: fx.Node) -> None:
        """Note what a node needs that is computed for the rows asked for."""
        for place, source in enumerate(filter(self._varies, node.all_input_nodes)):
            if self.reading.state[node] == ROWS:
                if operation(source) in SPLITS:
                    self.late_needed.add(source)
                else:
                    self._need_rows(source)
            elif operation(node) in _PRODUCTS and (place or source is not node.args[0]):
                self.whole_needed.add(source)
            else:
                self.late_needed.add(source)

    def _is_late(self, node: fx.Node) -> bool:
        """Whether a node is computed for the rows that are asked for; else they are taken out of all."""
        return node in self.late_needed and (node not in self.whole_needed or operation(node) in SPLITS)

    # -- writing

    def _given(self, node: fx.Node) -> None:
        made = self.graph.node_copy(node)
        (self.whole if self._varies(node) else self.fixed)[node] = made

    def _write(self, node: fx.Node) -> None:
        if not self._varies(node):
            self._write_fixed(node)
            return
        if node in self.whole_needed:
            dropped = is_dropout(node, self.module)
            self.whole[node] = self.whole[node.args[0]] if dropped else self.graph.node_copy(node, self._all_of)  # type: ignore[index]
        if self._is_late(node):
            self.some[node] = self._late(node)

    def _all_of(self, node: fx.Node) -> fx.Node:
        return self.whole[node] if self._varies(node) else self.fixed[node]

    def _write_fixed(self, node: fx.Node) -> None:
        asked = [source for source in node.all_input_nodes if self._varies(source)]
        if not asked or asked[0] in self.whole:
            if all(source in self.fixed or source in self.whole for source in node.all_input_nodes):
                self.fixed[node] = self.graph.node_copy(node, self._all_of)
            return
        source, name = asked[0], operation(node)
        if source not in self.some:
            return  # asked by nobody who is needed
        what = argument(node, 1, "dim") if name == "size" else "numel" if name == "numel" else None
        if name in ("dim", "ndimension") or (name == "getattr" and node.args[1] != "shape"):
            self.fixed[node] = self.graph.node_copy(node, lambda _: self.some[source])
        elif name == "is_contiguous":
            self.fixed[node] = self.graph.call_function(bool, (1,))
        else:
            arguments = (self.some[source], self.asked, self.axes[source], what)
            self.fixed[node] = self.graph.call_function(size_with_all, arguments)

    def _late(self, node: fx.Node) -> fx.Node:
        """Return the node of the rows that are asked for."""
        source = node.args[0] if node.args else None
        if is_dropout(node, self.module):
            assert isinstance(source, fx.Node)
            return self._rows(source) if self.reading.state[node] == ROWS else self._queries(source)
        if operation(node) in ("view", "reshape"):
            assert isinstance(source, fx.Node)
            given = self._rows(source) if self.reading.state[node] == ROWS else self._queries(source)
            if self.reading.state[node] == MIXED and self.axes[node] != 1:
                return given  # to the shape that it has
            sizes = fx.node.map_arg(sizes_of(node), self._all_of)
            return self._noted(node, self.graph.call_function(reshaped_rows, (given, sizes)))
        if self.reading.state[node] == ROWS:
            return self.graph.node_copy(node, lambda read: self._operand_of_rows(node, read))
        if operation(node) == ATTENTION:
            return self._attention(node)
        return self.graph.node_copy(node, lambda read: self._operand_of_queries(node, read))

    def _noted(self, node: fx.Node, made: fx.Node) -> fx.Node:
        made.meta.update({key: value for key, value in node.meta.items() if key in ("tensor", "bytes")})
        return made

    def _call(self, node: fx.Node, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        return self._noted(node, self.graph.call_function(function, arguments))

    def _rows(self, node: fx.Node) -> fx.Node:
        """Return the rows of a node that are asked for, one after the other."""
        if not self._is_late(node):
            return self._call(node, asked_rows, self.whole[node], self.asked)
        made = self.some[node]
        return made if self.reading.state[node] == ROWS else self._call(node, one_after_the_other, made, self.asked)

    def _queries(self, node: fx.Node) -> fx.Node:
        """Return the rows of a node that are asked for, by sequence, in whichever dimension tokens are."""
        if not self._is_late(node):
            dims, axis = len(self.reading.shape(node) or ()), self.axes[node]
            return self._call(node, at_tokens, self.whole[node], self.asked, dims, axis)
        made = self.some[node]
        return self._call(node, by_sequence, made, self.asked) if self.reading.state[node] == ROWS else made

    def _operand_of_rows(self, node: fx.Node, read: fx.Node) -> fx.Node:
        if self._varies(read):
            return self.some[read] if operation(read) in SPLITS else self._rows(read)
        reading, made = self.reading, self.fixed[read]
        mine, its = reading.shape(node) or (), reading.shape(read) or ()
        same = reading.leads(read) and len(mine) == len(its) and not broadcasts(its, mine)
        return self._call(read, asked_rows, made, self.asked) if same else made

    def _operand_of_queries(self, node: fx.Node, read: fx.Node) -> fx.Node:
        if operation(node) in _PRODUCTS and read is not node.args[0]:
            return self._all_of(read)
        if self._varies(read):
            return self.some[read] if operation(read) in SPLITS else self._queries(read)
        return self._fixed_at_tokens(node, read)

    def _fixed_at_tokens(self, node: fx.Node, read: fx.Node) -> fx.Node:
        """Return an operand that is no rows for the queries: what it has for each token is chosen."""
        made, its = self.fixed[read], self.reading.shape(read)
        dims, axis = len(self.reading.shape(node) or ()), self.axes[node]
        place = aligned(axis, dims, len(its)) if its else -1
        if its is None or place < 0 or its[place] == "1":
            return made
        return self._call(read, at_tokens, made, self.asked, dims, axis)

    def _attention(self, node: fx.Node) -> fx.Node:
        """Return attention of the queries, under their rows of the mask."""
        query, key, value, *more = node.args
        given = dict(zip(("attn_mask", "dropout_p", "is_causal"), more, strict=False)) | node.kwargs
        mask, causal = given.get("attn_mask"), given.get("is_causal", False)
        if given.get("dropout_p", 0.0) != 0 or type(causal) is not bool or not isinstance(query, fx.Node):
            raise NotPacked("its attention drops out")
        keys = self._all_of(key)  # type: ignore[arg-type]
        if causal:
            given["attn_mask"] = self._call(node, causal_at, self.asked, keys)
            given["is_causal"] = False
        elif isinstance(mask, fx.Node):
            if self._varies(mask):
                raise NotPacked("its mask is made of what the hidden states hold")
            given["attn_mask"] = self._fixed_at_tokens(node, mask)
        arguments = (self._queries(query), keys, self._all_of(value))  # type: ignore[arg-type]
        named = fx.node.map_arg(given, lambda read: self.fixed.get(read, read))
        return self._noted(node, self.graph.call_function(node.target, arguments, named))  # type: ignore[arg-type]
