"""attention: what an attention gives is made again in the backward pass; only for those who ask for it by its name.

torch keeps queries, keys, values and the result of `scaled_dot_product_attention`; an adapted layer behind it keeps the
same result.  Made again from queries, keys and values it is not kept at all, nor are keys that were repeated for
groups of heads, nor, in graphs on packed rows, any copy with zeros among them.  It costs the two products of
attention's forward pass once more: 4 · tokens · keys · width operations.  Results and gradients keep their bits.
"""

from dataclasses import dataclass

from torch import fx

from lora_fx.liveness.padding import packed_rows, unpacked_rows
from lora_fx.liveness.sequences import treats_sequences
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.onrows import reshaped_rows
from lora_fx.passes.pointwise import operation
from lora_fx.passes.recompute import Chain, make_again
from lora_fx.passes.rowwise import ATTENTION, SPLITS, argument

ATTEND = "attention"
_SHOWS = frozenset(
    {"view", "reshape", "transpose", "permute", "swapaxes", "unsqueeze", "squeeze", "flatten", "unflatten", "expand",
     "contiguous", "getitem"}
)  # fmt: skip
"""What shows or copies the entries of one tensor."""


@dataclass(frozen=True, slots=True)
class Attend(Pass):
    """Make results of attention again.  Ensures: the same results and gradients, bit by bit."""

    name: str = ATTEND

    def run(self, editor: Editor) -> None:
        make_again(editor, _chain, "adapted_attending")


def why_kept(graph: fx.Graph) -> str:
    """Return why the result of an attention in a graph is kept; "" if the graph has none."""
    found = [node for node in graph.nodes if operation(node) == ATTENTION]
    if not found:
        return ""
    return "no adapted layer takes its result" if all(map(_is_attention, found)) else "it drops out"


def _chain(call: fx.Node) -> Chain | None:
    """Return the attention before a call of adapted layers, with what only shows its operands and result."""
    x = call.args[0]
    assert isinstance(x, fx.Node)
    nodes: list[fx.Node] = []
    node = x
    while _shows(node) and (node is x or node.users.keys() <= set(nodes)):
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if not _is_attention(node) or not (node is x or node.users.keys() <= set(nodes)):
        return None
    nodes.append(node)
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source not in nodes and _shows(source) and source.users.keys() <= set(nodes):
            nodes.append(source)
            waiting += source.all_input_nodes
    return Chain(x, nodes)


def _is_attention(node: fx.Node) -> bool:
    """Whether it computes attention, without dropout, the same each time."""
    if treats_sequences(node.target):
        return True
    return operation(node) == ATTENTION and argument(node, 4, "dropout_p", 0.0) in (0, None)


def _shows(node: fx.Node) -> bool:
    """Whether it gives the entries of one tensor, each as it is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or "tensor" not in node.meta:
        return False
    if node.target in (packed_rows, unpacked_rows, reshaped_rows):
        return True
    return operation(node) in _SHOWS and operation(source) not in SPLITS and "tensor" in source.meta
