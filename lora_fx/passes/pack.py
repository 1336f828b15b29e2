"""pack: where a block's mask says which tokens are padding, its norms and linears run on the rows of the others only.

Rows are the first two dimensions, (batch, token), of the block's hidden states.  What treats rows apart runs on a
tensor [1, N, …] of N kept rows; before what mixes them it is unpacked, with zeros in the place of padding, and packed
after it.  What mixes rows must be known: attention under a mask that comes from the arguments, and what is around it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.capture.captured import Captured
from lora_fx.capture.tracing.inputs import TensorInput
from lora_fx.capture.tracing.writer import writes
from lora_fx.liveness.padding import packed_rows, unpacked_rows
from lora_fx.models.code import compiled
from lora_fx.models.tensors import attribute_at
from lora_fx.models.torch_internals import pytree
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.onrows import dropped, dropped_by, reshaped_rows, shown_rows, whole_size
from lora_fx.passes.pointwise import operation
from lora_fx.passes.rowwise import (
    ATTENTION,
    KNOWN,
    QUESTIONS,
    SPLITS,
    Shape,
    broadcasts,
    is_dropout,
    is_known_module,
    is_product,
    keeps_rows_apart,
)
from lora_fx.passes.stack import draws

FIXED, ROWS, MIXED = "fixed", "rows", "mixed"
"""What a node's value is: the same whatever the hidden states are; rows of them, kept apart; anything else of them."""


DRAWS = "the dropout of adapters draws for rows of padding too"
NO_HIDDEN = "it has no hidden states [batch, tokens, width] among its arguments"
NOTHING_MIXED = "nothing in it mixes rows"


class NotPacked(Exception):
    """The graph cannot run on the rows of real tokens only; the text is the reason.  An outcome, not an error."""


@dataclass(slots=True)
class Packing:
    """What is known of a graph that runs on packed rows."""

    hidden: int
    """Which of the inputs are the hidden states."""
    masks: tuple[int, ...]
    """The tensors among the inputs that the masks are made of."""
    mask_of: Callable[..., tuple[Tensor, ...]]
    """Called with the module and the inputs: the masks of the graph's attention, of bools that allow or of numbers."""
    draws: bool
    """Whether it draws random numbers where dropout is on."""


@dataclass(slots=True)
class Pack(Pass):
    """Run on real rows.  Ensures: the same values and gradients of kept rows, within rounding; the others are not made.

    The graph gets one more input, the call: it has `rows`, and `show` makes of packed rows what is returned.
    """

    captured: Captured
    name: str = "pack"
    packing: Packing | None = field(default=None, init=False)
    reading: "Reading | None" = field(default=None, init=False)
    """What it has found the nodes to be."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        if any(writes(node) for node in graph_module.graph.nodes):
            raise NotPacked("it writes in place, or to a cache (pass use_cache=False)")
        if any(node.target is adapted_output and draws(node, graph_module) for node in graph_module.graph.nodes):
            raise NotPacked(DRAWS)

    def run(self, editor: Editor) -> None:
        self.reading = reading = Reading(editor.graph_module, self.captured)
        masks = list(reading.masks())
        self.packing = packing_of(reading, masks)
        _Rewriting(editor, reading).rewrite()


class Reading:
    """Which of the three each node of a graph is."""

    def __init__(self, graph_module: fx.GraphModule, captured: Captured) -> None:
        """Read a graph.

        Raises:
            NotPacked: with what speaks against packing.
        """
        self.graph_module = graph_module
        self.placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self.equal: dict[str, str] = {}
        for node, given in zip(self.placeholders, captured.inputs, strict=True):
            if isinstance(given, TensorInput) and "tensor" in node.meta:
                for name, symbol, size in zip(node.meta["tensor"][0], given.symbols, given.shape, strict=True):
                    self.equal[name] = str(size) if symbol is None else symbol
        self.hidden = self._hidden()
        shape = self.shape(self.hidden)
        assert shape is not None
        self.lead = tuple(shape[:2])
        self.state: dict[fx.Node, str] = {}
        for node in graph_module.graph.nodes:
            self.state[node] = self._state(node)

    def shape(self, node: fx.Node) -> Shape | None:
        """Return a node's sizes as text."""
        if node.op == "get_attr":
            value = attribute_at(self.graph_module, str(node.target))
            return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None
        facts = node.meta.get("tensor")
        return None if facts is None else tuple(self.equal.get(size, size) for size in facts[0])

    def leads(self, node: fx.Node) -> bool:
        """Whether a node's first two dimensions are those of the hidden states."""
        shape = self.shape(node)
        return shape is not None and len(shape) >= 2 and tuple(shape[:2]) == self.lead

    def _hidden(self) -> fx.Node:
        for node in self.placeholders:
            shape = self.shape(node)
            if shape is not None and len(shape) == 3 and node.meta["tensor"][1].is_floating_point:
                if any(size.isdigit() for size in shape[:2]):
                    break
                return node  # type: ignore[no-any-return]
        raise NotPacked(NO_HIDDEN)

    def _state(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            return ROWS if node is self.hidden else FIXED
        read = [source for source in node.all_input_nodes if self.state[source] != FIXED]
        if not read or operation(node) in QUESTIONS:
            return FIXED
        if node.kwargs.get("inplace") or "out" in node.kwargs:
            raise NotPacked(f"{spoken(node)} writes in place")
        if node.op == "output":
            return ROWS
        if self._is_of_rows(node, read):
            return ROWS
        if operation(node) in KNOWN or is_product(node, self.graph_module) or is_dropout(node, self.graph_module):
            return MIXED
        if is_known_module(node, self.graph_module):
            return MIXED
        return self.of_unknown(node)

    def of_unknown(self, node: fx.Node) -> str:
        """Return the state of what is not known to keep rows apart, nor to be right with zeros among them.

        Raises:
            NotPacked: as here, where zeros would be among them.
        """
        raise NotPacked(f"{spoken(node)} may mix rows")

    def _is_of_rows(self, node: fx.Node, read: list[fx.Node]) -> bool:
        if operation(node) == "getitem" and operation(read[0]) in SPLITS:
            return self.state[read[0]] == ROWS
        shapes = [self.shape(source) for source in read]
        if not all(map(self.leads, read)) or not any(self.state[source] == ROWS for source in read):
            return is_product(node, self.graph_module) and all(map(self.leads, read))
        if is_product(node, self.graph_module) or is_dropout(node, self.graph_module):
            return True
        if is_known_module(node, self.graph_module):
            return len(shapes[0] or ()) > 2
        dims = len(shapes[0] or ())
        if operation(node) not in KNOWN or not keeps_rows_apart(node, dims):
            return False
        return operation(node) in SPLITS or (self.leads(node) and self._others_fit(node))

    def _others_fit(self, node: fx.Node) -> bool:
        """Whether the operands that are no rows are the same for all rows, or have the shape of rows."""
        result = self.shape(node)
        for source in node.all_input_nodes:
            shape = self.shape(source)
            if self.state[source] != FIXED or not shape or result is None:
                continue
            if not broadcasts(shape, result) and not (len(shape) == len(result) and self.leads(source)):
                return False
        return True

    # -- attention

    def masks(self) -> Iterator[tuple[fx.Node, bool]]:
        """Yield the mask of each attention among the rows, and whether it forbids where it is True.

        Raises:
            NotPacked: there is none, or it is not known.
        """
        found = False
        for node in self.graph_module.graph.nodes:
            if self.state[node] != MIXED:
                continue
            if operation(node) == ATTENTION and any(self.state[key] != FIXED for key in node.all_input_nodes[1:3]):
                found = True
                yield self._mask_of_attention(node), False
            elif operation(node) == "softmax" and self._is_over_tokens(node):
                found = True
                yield self._mask_before(node)
        if not found:
            raise NotPacked(NOTHING_MIXED)

    def _mask_of_attention(self, node: fx.Node) -> fx.Node:
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        if not isinstance(mask, fx.Node) or self.state[mask] != FIXED:
            raise NotPacked("its attention has no mask that says what is padding")
        return mask

    def _is_over_tokens(self, node: fx.Node) -> bool:
        shape = self.shape(node)
        return shape is not None and len(shape) >= 3 and shape[-1] == self.lead[1]

    def _mask_before(self, softmax: fx.Node) -> tuple[fx.Node, bool]:
        node = softmax.args[0]
        while isinstance(node, fx.Node) and self.state[node] == MIXED:
            name, operands = operation(node), [source for source in node.all_input_nodes if self.state[source] == FIXED]
            masks = [source for source in operands if (self.shape(source) or ("",))[-1] == self.lead[1]]
            if name == "add" and masks:
                return masks[0], False
            if name == "masked_fill" and masks:
                return masks[0], True
            if name == "where" and node.args[0] in masks:
                return masks[0], False
            if name not in ("add", "to", "float", "div", "mul", "type_as", "maximum", "clamp"):
                break
            node = next(source for source in node.all_input_nodes if self.state[source] == MIXED)
        raise NotPacked("its attention has no mask that says what is padding")


def sizes_of(node: fx.Node) -> Any:
    """Return the sizes that a view is given, as a tuple or as one node."""
    return node.args[1] if len(node.args) == 2 and not isinstance(node.args[1], int) else node.args[1:]


def spoken(node: fx.Node) -> str:
    """Return what reasons call a node."""
    return f"{node.target} ({node.name})" if node.op == "call_module" else operation(node) or str(node.target)


def packing_of(reading: Reading, masks: list[tuple[fx.Node, bool]]) -> Packing:
    """Return what is known of a graph whose rows are read, under the masks of the attention in it.

    Raises:
        NotPacked: a mask is made of the rows, or of no argument.
    """
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    wanted: dict[fx.Node, None] = {}
    waiting = [mask for mask, _ in masks]
    while waiting:
        node = waiting.pop()
        wanted[node] = None
        if reading.state[node] == FIXED:
            waiting += [source for source in node.all_input_nodes if source not in wanted]
    for node in reading.graph_module.graph.nodes:
        if node.op == "placeholder" or (node in wanted and reading.state[node] == FIXED):
            if any(source not in made for source in node.all_input_nodes):
                raise NotPacked("its mask is made of what the hidden states hold")
            made[node] = graph.node_copy(node, made.__getitem__)
    results = [graph.call_function(torch.logical_not, (made[mask],)) if no else made[mask] for mask, no in masks]
    graph.output(tuple(dict.fromkeys(results)))
    sources = [
        index
        for index, node in enumerate(reading.placeholders)
        if node in wanted and node is not reading.hidden and len(reading.shape(node) or ()) > 1
    ]
    if not sources:
        raise NotPacked("its mask does not come from its arguments")
    draws = any(
        is_dropout(node, reading.graph_module) or (operation(node) == ATTENTION and node.kwargs.get("dropout_p"))
        for node in reading.graph_module.graph.nodes
    )
    mask_of = compiled(graph, "<lora_fx mask>")
    return Packing(reading.placeholders.index(reading.hidden), tuple(sources), mask_of, draws)


class _Rewriting:
    """Writes packing and unpacking into a graph that has been read."""

    def __init__(self, editor: Editor, reading: Reading) -> None:
        self.editor = editor
        self.reading = reading
        self.changed: dict[tuple[fx.Node, Any], fx.Node] = {}
        last = reading.placeholders[-1]
        with editor.graph.inserting_after(last):
            self.call = editor.graph.placeholder("lora_fx_call")
        with editor.writing_after(self.call, "") as write:
            self.rows = write.graph.call_function(getattr, (self.call, "rows"))

    def rewrite(self) -> None:
        state = self.reading.state
        for node in list(state):
            if node.op == "output":
                self._output(node)
            elif state[node] == ROWS and node is not self.reading.hidden:
                for source in node.all_input_nodes:
                    self._make_fit(node, source)
                self._whole_shape(node)
            else:
                for source in node.all_input_nodes:
                    if state.get(source) == ROWS:
                        self._give_whole(node, source)

    def _made(self, source: fx.Node, function: Callable[..., Any], *more: Any) -> fx.Node:
        """Return the node of a function of a node and the rows; one for all who ask."""
        key = (source, (function, *more))
        if key not in self.changed:
            after = source if source > self.rows else self.rows
            with self.editor.writing_after(after, "") as write:
                made = write.graph.call_function(function, (source, self.rows, *more))
            made.meta.update({key: value for key, value in source.meta.items() if key in ("tensor", "bytes")})
            self.changed[key] = made
        return self.changed[key]

    def _make_fit(self, node: fx.Node, source: fx.Node) -> None:
        """Let a node on packed rows have a packed operand."""
        reading = self.reading
        if reading.state.get(source) == MIXED or (
            reading.state.get(source) == FIXED
            and reading.leads(source)
            and len(reading.shape(source) or ()) == len(reading.shape(node) or ())
            and not broadcasts(reading.shape(source) or (), reading.shape(node) or ())
        ):
            self.editor.replace_operand(node, source, self._made(source, packed_rows), "")

    def _give_whole(self, node: fx.Node, source: fx.Node) -> None:
        """Let a node that mixes, or asks for a size, see what it saw before."""
        name = operation(node)
        if name in QUESTIONS:
            if node.args[0] is source:
                self._answer(node, source, name)
        else:
            self.editor.replace_operand(node, source, self._made(source, unpacked_rows), "")

    def _answer(self, node: fx.Node, source: fx.Node, name: str) -> None:
        if name == "getattr" and node.args[1] != "shape":
            return
        dim = node.args[1] if name == "size" and len(node.args) > 1 else node.kwargs.get("dim")
        if name == "size" and type(dim) is int and dim not in (0, 1):
            dims = len(self.reading.shape(source) or ())
            if dim >= 2 or dim + dims >= 2:
                return
        with self.editor.writing_after(node, "") as write:
            asked = dim if name == "size" else name if name in ("numel", "is_contiguous") else None
            if name in ("dim", "ndimension"):
                return
            new = write.graph.call_function(whole_size, (source, self.rows, asked))
        self._replace(node, new)

    def _whole_shape(self, node: fx.Node) -> None:
        """Let what reshapes packed rows keep them packed, and a dropout draw for the whole tensor."""
        name = operation(node)
        if name in ("view", "reshape", "expand"):
            with self.editor.writing_after(node, "") as write:
                new = write.graph.call_function(reshaped_rows, (node.args[0], sizes_of(node)))
        elif is_dropout(node, self.editor.graph_module):
            with self.editor.writing_after(node, "") as write:
                if node.op == "call_module":
                    layer = write.graph.get_attr(str(node.target))
                    new = write.graph.call_function(dropped_by, (node.args[0], self.rows, layer))
                else:
                    new = write.graph.call_function(dropped, (self.rows, *node.args), dict(node.kwargs))
        else:
            return
        self._replace(node, new)

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        self.reading.state[new] = self.reading.state[node]
        self.editor.replace(node, new, "")

    def _output(self, output: fx.Node) -> None:
        places = pytree.tree_leaves(output.args[0])
        for source in output.all_input_nodes:
            state = self.reading.state.get(source)
            if state == FIXED or state is None:
                continue
            if not self.reading.leads(source) or len(self.reading.shape(source) or ()) != 3:
                raise NotPacked(f"it returns {spoken(source)}, in which rows are mixed")
            packed = source if state == ROWS else self._made(source, packed_rows)
            with self.editor.writing_after(packed, "") as write:
                shown = write.graph.call_function(shown_rows, (packed, self.call, places.index(source)))
            self.editor.replace_operand(output, source, shown, "")
