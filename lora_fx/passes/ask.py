"""ask: base + scaling · B A x, node by node → calls of layers that add what is used of their adapters.

A graph has no branches: LoRA nodes compute one choice of adapters, in every thread.  A layer asks at each call.
"""

from dataclasses import dataclass

from torch import fx, nn

from lora_fx.adapters.adapt import adapt, read_in_graph
from lora_fx.adapters.attach import STATE, Attached, all_attached
from lora_fx.adapters.selection import Switch
from lora_fx.errors import InvariantError, RefusedError
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.remove import erase_lora_nodes
from lora_fx.passes.sites import lora_nodes


def in_nodes(graph_module: fx.GraphModule) -> list[tuple[str, Attached]]:
    """Return (path of the site, adapter) for the adapters that stand in the graph node by node."""
    return [(path, one) for path, one in all_attached(graph_module) if STATE not in one.owner.__dict__]


def not_asking(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    """Return (path, reason) for all that only nodes can compute."""
    facts = []
    for path, one in in_nodes(graph_module):
        if one.owner is graph_module:
            facts.append((path, "its weight is the GraphModule's own"))
        elif one.call is not None:
            facts.append((path, "has an adapter for each call"))
        facts += [(name, "is the GraphModule's own, and trained") for name in _trained_here(one)]
    return list(dict.fromkeys(facts))


def _trained_here(one: Attached) -> list[str]:
    return [name for name in one.spec.record.switch.whole if "." not in name]


@dataclass(frozen=True, slots=True)
class Ask(Pass):
    """Let layers add their adapters, as far as these are used.  Ensures: no LoRA node is left; all keys kept."""

    name: str = "ask"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if facts := not_asking(graph_module):
            advice = "adapt the model that the graph was made from"
            raise RefusedError("the graph of a GraphModule has one choice of adapters for all its calls", facts, advice)

    def run(self, editor: Editor) -> None:
        read = read_in_graph(editor.graph_module)
        erase_lora_nodes(editor)
        owners: dict[nn.Module, list[str]] = {}
        switches: dict[nn.Module, Switch] = {}
        for _, one in in_nodes(editor.graph_module):
            switches[one.owner] = one.spec.record.switch
            is_read = not one.spec.path_is_owner or one.spec.site.read or one.spec.site.weight in read
            owners.setdefault(one.owner, []).extend([one.spec.parameter] if is_read else [])
        for owner, names in owners.items():
            adapt(owner, names, False, switches[owner])

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = [(subgraph.path, "") for subgraph in lora_nodes(graph_module)] + [
            (path, "") for path, _ in in_nodes(graph_module)
        ]
        if left:
            raise InvariantError("an adapter still stands in the graph", left)
