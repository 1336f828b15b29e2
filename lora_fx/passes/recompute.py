"""recompute: what adapted layers multiply is made again in the backward pass instead of kept, where that is cheap.

A norm's output, silu(gate) · up, gelu(h): entry by entry or along a row, from tensors that are kept anyway.  Where the
chain of such operations begins is chosen so that the fewest bytes are kept.  It never reaches across random numbers, or
into a graph that changes a tensor in place, and only takes in what nobody else uses; the layers' input itself may have
other users, who then get it as a result.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lora_fx.adapters.fused.origin import told_layer_norm
from lora_fx.adapters.fused.siblings import adapted_siblings, making
from lora_fx.capture.tracing.proxies import append_item, set_attribute, set_item
from lora_fx.capture.tracing.writer import writes
from lora_fx.models.code import compiled
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.onrows import shown_rows
from lora_fx.passes.pointwise import bytes_of, is_alias, is_quiet, is_repeatable, kept_by_autograd, work_of
from lora_fx.passes.stack import draws, is_adapted_linear

_LONGEST = 24
"""How many operations a chain may have."""
_PRICE = 0.1
"""How many bytes must be saved for each byte that is computed again, in one pass, for it to be worth its time."""


@dataclass(frozen=True, slots=True)
class Recompute(Pass):
    """Make inputs of adapted layers again.  Ensures: the same results and gradients.

    A norm in half precision that ends the block tells its ε, so that layers of the next block can do the same.
    """

    name: str = "recompute"
    runs: bool = True
    """Whether the graph will run; of one that is only looked at no code is written."""

    def run(self, editor: Editor) -> None:
        make_again(editor, _chain, "adapted_making", self.runs)
        for node in list(editor.graph.nodes):
            if node.target is F.layer_norm and _is_half(node) and any(_ends(user) for user in node.users):
                with editor.writing_after(node, "") as write:
                    told = write.graph.call_function(told_layer_norm, node.args, node.kwargs)
                editor.replace(node, told, "")


def _is_half(node: fx.Node) -> bool:
    return "tensor" in node.meta and node.meta["tensor"][1] in (torch.bfloat16, torch.float16)


def _ends(node: fx.Node) -> bool:
    """Whether it is what the block returns, which layers of the next block may multiply."""
    return node.op == "output" or node.target is shown_rows


def make_again(editor: Editor, chain_of: "Callable[[fx.Node], Chain | None]", name: str, runs: bool = True) -> None:
    """Let each call of adapted layers make its input from where the chain begins that `chain_of` gives for the call.

    Not in a graph that writes to tensors in place, nor across random numbers.
    """
    # a statement that changes an object, such as a cache of keys, does no harm
    changes_no_tensor = (set_attribute, set_item, append_item)
    if any(writes(node) and node.target not in changes_no_tensor for node in editor.graph.nodes):
        return
    for number, node in enumerate(list(editor.graph.nodes)):
        if node.target is adapted_siblings or is_adapted_linear(node, editor.graph_module):
            chain = chain_of(node)
            if chain is not None and _may_move(node, chain.x, editor.graph_module):
                produce = _function_of(chain) if runs else _never_run
                _rewrite(editor, node, chain, f"{name}_{number}", produce)


@dataclass(slots=True)
class Chain:
    """Operations that end in `x`, in the order in which they were found: users before what they use."""

    x: fx.Node
    nodes: list[fx.Node]

    @property
    def inputs(self) -> list[fx.Node]:
        """What the chain is made from, in graph order of the first use."""
        sources = dict.fromkeys(source for node in reversed(self.nodes) for source in node.all_input_nodes)
        return [source for source in sources if source not in self.nodes]

    def gain(self) -> float:
        """Return how many bytes fewer are kept if the chain's inputs are and nothing inside of it, less its price.

        x = silu(gate) * up, each of 100 MB, gate and up from linears that keep neither of them.  Without the chain
        autograd keeps gate (for silu), silu(gate) and up (for mul), and x (for the adapters' A): 400 MB.  The chain
        (mul, silu) has the inputs gate and up: 200 MB.  Saved are 200 MB; computed again are mul, one pass over 100 MB,
        and silu, worth six: 0.1 · 700 MB = 70 MB.  The gain is 130 MB.  With mul alone, silu(gate) is an input and gate
        is still kept for silu: 100 MB saved, less 10 MB, so the longer chain is taken.
        """
        kept = [self.x, *(value for node in self.nodes for value in kept_by_autograd(node))]
        wanted = [value for value in self.inputs if value.op != "get_attr"]
        before, after = set(map(shown_by, kept)), set(map(shown_by, wanted))
        anyway = {shown_by(value) for value in (*kept, *wanted) if self._is_kept(value)}
        work = sum(bytes_of(node) * work_of(node) for node in self.nodes)
        saved, added = before - after - anyway, after - before - anyway
        return sum(map(bytes_of, saved)) - sum(map(bytes_of, added)) - _PRICE * work

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether a tensor is kept for what makes it, or for who uses it, outside of the chain."""
        others = [other for other in (node, *node.users) if other not in self.nodes]
        return any(node in kept_by_autograd(other) for other in others if is_repeatable(other))


def shown_by(node: fx.Node) -> fx.Node:
    """Return the node whose storage this one shows."""
    while is_alias(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def _chain(call: fx.Node) -> Chain | None:
    """Return the chain before a call of adapted layers that saves the most; None if none saves anything."""
    x = call.args[0]
    assert isinstance(x, fx.Node)
    best = max(itertools.islice(_chains(x), _LONGEST), key=Chain.gain, default=None)
    return best if best is not None and best.gain() > 0 else None


def _chains(x: fx.Node) -> Iterator[Chain]:
    """Yield longer and longer chains: each takes in the cheapest operation, of equals the latest, that it can.

    Such an operation is repeatable and has no user outside but for x.
    """
    chain = Chain(x, [])
    fit = [x] if is_repeatable(x) else []
    while fit:
        cheapest = max(fit, key=lambda source: (-work_of(source), source))
        chain = Chain(x, [*chain.nodes, cheapest])
        yield chain
        fit = [source for source in chain.inputs if is_repeatable(source) and source.users.keys() <= set(chain.nodes)]


def is_making(node: fx.Node) -> bool:
    """Whether the node calls adapted layers and makes their input."""
    return isinstance(getattr(node.target, "makes", None), int)


def _may_move(call: fx.Node, x: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the call may be made as early as the first user of x: nothing before it would draw after it then."""
    node = min(x.users)
    while node is not call:
        if not is_quiet(node) or (node.target is adapted_output and draws(node, graph_module)):
            return False
        node = node.next
    return True


def _rewrite(editor: Editor, call: fx.Node, chain: Chain, name: str, produce: Callable[..., Tensor]) -> None:
    """Let the call take the chain's inputs, and make its own input from them."""
    layers: list[Any] = list(call.args[1:])
    inputs, x = chain.inputs, chain.x
    others = [user for user in x.users if user is not call]
    site = str(call.meta.get("site", ""))
    with editor.writing_after(min((call, *others)).prev, site) as write:
        layers = [write.graph.get_attr(str(layer.target)) for layer in layers]
        made = write.graph.call_function(making(produce, len(layers), bool(others), name), (*layers, *inputs))
        results = [write.graph.call_function(operator.getitem, (made, i)) for i in range(len(layers) + bool(others))]
    if others:
        results[-1].meta.update(x.meta)
        editor.replace_uses(x, results[-1], site, but=lambda user: user is call)
    _replace(editor, call, results, site)
    for node in sorted(chain.nodes, reverse=True):
        if not node.users:
            editor.erase(node, site)


def _replace(editor: Editor, call: fx.Node, results: list[fx.Node], site: str) -> None:
    if call.target is adapted_output:
        editor.replace(call, results[0], site)
        return
    for item in list(call.users):
        editor.replace(item, results[item.args[1]], site)  # type: ignore[index]
    editor.erase(call, site)


def _never_run(*inputs: Tensor) -> Tensor:
    raise AssertionError("this graph is only looked at")


def _function_of(chain: Chain) -> Callable[..., Tensor]:
    """Return the chain as a function of its inputs."""
    graph = fx.Graph()
    made = {node: graph.placeholder(f"x{number}") for number, node in enumerate(chain.inputs)}
    for node in sorted(chain.nodes):
        made[node] = graph.node_copy(node, lambda operand: made[operand])
    graph.output(made[chain.x])
    return functools.partial(compiled(graph, "<lora_fx recomputed chain>"), None)
