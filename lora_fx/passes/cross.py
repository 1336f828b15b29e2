"""cross: of another sequence, whose rows a block's attention makes keys and values of, padding may be anything.

An encoder's states in a decoder's block: where the mask of that attention forbids a key for every query, no row of the
block's result depends on it.  So the block may be given zeros there, and an encoder that has left out its padding is
not asked for it.
"""

from collections.abc import Iterator

from torch import fx

from lora_fx.capture.captured import Captured
from lora_fx.capture.tracing.writer import writes
from lora_fx.passes.pack import FIXED, MIXED, NotPacked, Packing, Reading, packing_of
from lora_fx.passes.pointwise import operation
from lora_fx.passes.rowwise import ATTENTION
from lora_fx.passes.tokenaxis import token_axes


class _OtherReading(Reading):
    """A reading of what becomes of the rows of another input than the hidden states."""

    def __init__(self, graph_module: fx.GraphModule, captured: Captured, place: int) -> None:
        self._place = place
        super().__init__(graph_module, captured)

    def _hidden(self) -> fx.Node:
        return self.placeholders[self._place]  # type: ignore[no-any-return]

    def masks(self) -> Iterator[tuple[fx.Node, bool]]:
        """Yield the mask of each attention that has the rows as its keys."""
        for node, state in self.state.items():
            if state == MIXED and operation(node) == ATTENTION and self._reads_rows(node):
                yield self._mask_of_attention(node), False

    def _reads_rows(self, attention: fx.Node) -> bool:
        """Whether keys or values of an attention are made of the rows, one of each."""
        made = any(self.state[read] != FIXED for read in attention.all_input_nodes[1:3])
        return made and (self.shape(attention.all_input_nodes[1]) or ("", ""))[-2] == self.lead[1]

    def only_attended(self) -> bool:
        """Whether all that is made of the rows, row by row, goes into keys and values of attention and nowhere else."""
        axes = token_axes(self, repeats=True)
        return all(
            user in axes or self.state[user] == FIXED or (operation(user) == ATTENTION and node in user.args[1:3])
            for node in axes
            for user in node.users
        )


def crossings_of(graph_module: fx.GraphModule, captured: Captured) -> dict[int, Packing]:
    """Return, for each input that is rows of another sequence, the masks under which its padding counts for nothing.

    The first input of rows is the block's own hidden states.  The graph stays as it is.
    """
    found: dict[int, Packing] = {}
    if any(writes(node) for node in graph_module.graph.nodes):
        return found
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for place in [place for place, node in enumerate(placeholders) if _is_of_rows(node)][1:]:
        try:
            reading = _OtherReading(graph_module, captured, place)
            masks = list(reading.masks())
            if masks and reading.only_attended() and not any(size.isdigit() for size in reading.lead):
                found[place] = packing_of(reading, masks)
        except NotPacked:
            continue
    return found


def _is_of_rows(placeholder: fx.Node) -> bool:
    facts = placeholder.meta.get("tensor")
    return facts is not None and len(facts[0]) == 3 and facts[1].is_floating_point
