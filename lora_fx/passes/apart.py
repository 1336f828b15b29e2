"""apart: in a graph on packed rows, attention takes one sequence after the other, without its padding.

What mixes rows is unpacked before and packed after it; where it keeps sequences apart, as attention does with what is
around it (heads, rotations of positions, repeated keys), each sequence goes through alone, as many rows long as are
kept of it.  Nothing is copied into zeros then, no weight of padding is computed, and a mask that allows the rest, or
all keys up to each query's own, is left out.  Sums are then in another order, which the proof of packed code covers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from lora_fx.liveness.padding import packed_rows, unpacked_rows
from lora_fx.liveness.sequences import BATCH, OF_ALL, OF_ROWS, OTHER, TOKENS, Operand, apart, attended, of_no_module
from lora_fx.models.code import compiled
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.onrows import size_of, whole_size
from lora_fx.passes.pack import FIXED, MIXED, ROWS, Reading
from lora_fx.passes.pointwise import operation
from lora_fx.passes.rowwise import ALONG_A_DIMENSION, ATTENTION, ENTRY_BY_ENTRY, Shape, argument, is_dropout
from lora_fx.passes.tokenaxis import token_axes

_SIZES_GO_TO = frozenset({"view", "reshape", "expand", "getitem", "unflatten"})
"""What may be given a size that is another for each sequence: none of these computes entries by it."""
_MAKE_SIZES = frozenset({"getattr", "size", "getitem", "mul", "floordiv"})


class _Whole(Exception):
    """What mixes rows must see all of them; an outcome, not an error."""


@dataclass(frozen=True, slots=True)
class Apart(Pass):
    """Let sequences go alone through attention.  Ensures: the same values within rounding.

    Runs after Pack, with what that has read.
    """

    reading: Reading
    name: str = "apart"

    def run(self, editor: Editor) -> None:
        reading, state = self.reading, dict[fx.Node, str]()
        for node in editor.graph.nodes:
            between = ROWS if node.target in (packed_rows, unpacked_rows) else FIXED
            state[node] = reading.state.get(node, between)
        reading.state = state
        axes = token_axes(reading, repeats=True)
        for nodes in list(_mixed(reading)):
            try:
                stretch = _Stretch(editor, reading, nodes)
                if not all(node in axes for node in nodes):
                    raise _Whole
                stretch.rewrite()
            except _Whole:
                continue


def _mixed(reading: Reading) -> Iterator[list[fx.Node]]:
    """Yield the nodes that mix rows, in groups that pass what is mixed to each other, in the order of the graph."""
    flow = nx.Graph()
    for node, state in reading.state.items():
        if state == MIXED:
            flow.add_node(node)
            flow.add_edges_from((source, node) for source in node.all_input_nodes if reading.state[source] == MIXED)
    for group in nx.connected_components(flow):
        yield sorted(group)


class _Stretch:
    """Nodes that mix rows, what they are given, and the sizes that they ask for."""

    def __init__(self, editor: Editor, reading: Reading, nodes: list[fx.Node]) -> None:
        self.editor, self.reading = editor, reading
        self.inner = set(nodes)
        self.mixed = frozenset(nodes)
        self.result = nodes[-1]
        self.operands: dict[fx.Node, Operand] = {}
        if any(node.op not in ("call_function", "call_method") or self._sees_all(node) for node in nodes):
            raise _Whole
        for node in nodes:
            for source in node.all_input_nodes:
                self._take(source, node)
        self._check_results()

    def _sees_all(self, node: fx.Node) -> bool:
        """Whether it draws random numbers, which are drawn for all rows at once, or takes a mean of all tokens."""
        if operation(node) in ALONG_A_DIMENSION - {"softmax", "log_softmax"}:
            along, shape = argument(node, 1, "dim"), self.reading.shape(node.all_input_nodes[0])
            dims = along if isinstance(along, (tuple, list)) else (along,)
            return shape is None or any(type(dim) is not int or shape[dim] == self.reading.lead[1] for dim in dims)
        if operation(node) == ATTENTION:
            p = argument(node, 4, "dropout_p", 0.0)
            return isinstance(p, fx.Node) or p != 0
        return is_dropout(node, self.editor.graph_module)

    def _take(self, source: fx.Node, user: fx.Node) -> None:
        """Note what a node of the stretch is given: rows, something fixed, or a size."""
        if source in self.inner or source in self.operands:
            return
        if source.target is unpacked_rows:
            self.operands[source] = Operand(OF_ROWS)
        elif self.reading.state[source] != FIXED:
            raise _Whole
        elif self.reading.shape(source) is not None:
            self.operands[source] = self._fixed(source)
        else:
            self._size(source, user)

    def _fixed(self, source: fx.Node) -> Operand:
        """Return how a tensor is parted that does not depend on the hidden states."""
        batch, length = self.reading.lead
        dims = []
        for dim, size in enumerate(self.reading.shape(source) or ()):
            if size == batch and dim == 0:
                dims.append(BATCH)
            elif size == length and size != batch:
                dims.append(TOKENS)
            elif {batch, length} & set(re.findall(r"\w+", size)):
                raise _Whole
            else:
                dims.append(OTHER)
        users = [user for user in source.users if user in self.mixed]
        masked = [_masks_only(source, user) for user in users]
        for user, is_mask in zip(users, masked, strict=True):
            self._check_tokens(source, dims, user, is_mask)
        is_mask = all(masked)
        return Operand(tuple(dims) if any(dims) else OF_ALL, is_mask and any(dims))

    def _check_tokens(self, source: fx.Node, dims: list[str], user: fx.Node, is_mask: bool) -> None:
        """Hold that what is fixed has the hidden states' tokens where its length is theirs, not as many others.

        So it is where it meets them entry by entry, and in a mask of their own keys.  Keys of another sequence that is
        as long (an encoder's) are none of theirs.
        """
        if TOKENS not in dims:
            return
        if is_mask and len(user.args) >= 3 and all(read in self.mixed for read in user.args[:3]):
            return
        if operation(user) not in ENTRY_BY_ENTRY or not any(
            self._meets(dims, self.reading.shape(read) or ()) for read in user.all_input_nodes if read in self.mixed
        ):
            raise _Whole

    def _meets(self, dims: list[str], shape: Shape) -> bool:
        """Whether the tokens of an operand broadcast along those of a tensor of rows."""
        pairs = zip(reversed(dims), reversed(shape), strict=False)
        return len(dims) <= len(shape) and all(size == self.reading.lead[1] for what, size in pairs if what == TOKENS)

    def _size(self, node: fx.Node, user: fx.Node) -> None:
        """Take in what makes a size, which each sequence has its own of."""
        if user in self.mixed and operation(user) not in _SIZES_GO_TO:
            raise _Whole
        if node.target is not whole_size and self._place(node) is None:
            if operation(node) not in _MAKE_SIZES:
                raise _Whole
            for source in node.all_input_nodes:
                self._take(source, node)
        self.inner.add(node)

    def _place(self, node: fx.Node) -> int | None:
        """Return 0 where a node is the number of sequences, 1 where it is their length; None if it is not seen here."""
        dim = argument(node, 1, "dim")
        shape = self.reading.shape(node.all_input_nodes[0]) if operation(node) == "size" and type(dim) is int else None
        return self.reading.lead.index(shape[dim]) if shape and shape[dim] in self.reading.lead else None

    def _check_results(self) -> None:
        """Hold that only the last node is used by others, as packed rows, and sizes of what is mixed by nobody else."""
        for node in self.inner - self.mixed:
            if self.mixed.intersection(node.all_input_nodes) and not self.inner.issuperset(node.users):
                raise _Whole
        for node in self.mixed:
            outside = [user for user in node.users if user not in self.inner]
            if outside and (node is not self.result or any(user.target is not packed_rows for user in outside)):
                raise _Whole
        if not self.result.users or not self.reading.leads(self.result):
            raise _Whole

    def _copied_size(self, graph: fx.Graph, node: fx.Node, rows: fx.Node) -> fx.Node:
        """Return the node of a size that does not need the tensor that was asked."""
        place = self._place(node)
        if place is not None:
            return graph.call_function(size_of, (rows, (), place))
        source, _, asked = node.args
        behind = (self.reading.shape(source) or ())[2:]  # type: ignore[arg-type]
        if not all(size.isdigit() for size in behind):
            raise _Whole
        return graph.call_function(size_of, (rows, tuple(map(int, behind)), asked))

    def rewrite(self) -> None:
        """Put one call in the place of the stretch."""
        graph = fx.Graph()
        rows = graph.placeholder("rows")
        made = {node: graph.placeholder(f"x{number}") for number, node in enumerate(self.operands)}
        for node in sorted(self.inner):
            if node.target is whole_size or self._place(node) is not None:
                made[node] = self._copied_size(graph, node, rows)
            else:
                made[node] = graph.node_copy(node, made.__getitem__)
                if operation(node) == ATTENTION:
                    made[node].target = attended
        graph.output(made[self.result])
        function = apart(of_no_module(compiled(graph, "<lora_fx attention of a sequence>")), (*self.operands.values(),))
        for packed in list(self.result.users):
            given: list[Any] = [node.args[0] if own.dims == OF_ROWS else node for node, own in self.operands.items()]
            with self.editor.writing_after(packed, "") as write:
                new = write.graph.call_function(function, (packed.args[1], *given))
            self.reading.state[new] = ROWS
            self.editor.replace(packed, new, "")
        for node in sorted(self.inner | self.operands.keys(), reverse=True):
            if not node.users and (node in self.inner or node.target is unpacked_rows):
                self.editor.erase(node, "")


def _masks_only(mask: fx.Node, attention: fx.Node) -> bool:
    """Whether a node is the mask of an attention, and none of its other operands."""
    return (
        operation(attention) == ATTENTION
        and mask is argument(attention, 3, "attn_mask")
        and mask not in attention.args[:3]
    )
