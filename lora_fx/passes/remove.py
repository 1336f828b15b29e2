"""remove: base + scaling · B A x → the base alone, bit-equal to the original."""

from dataclasses import dataclass

from torch import fx

from lora_fx.adapters.attach import all_attached, detach, is_adapted, owner_path
from lora_fx.errors import InvariantError, RefusedError
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.sites import lora_nodes


@dataclass(frozen=True, slots=True)
class Remove(Pass):
    """Take every adapter away.  Ensures: no LoRA node or module is left; keys = base keys."""

    name: str = "remove"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not is_adapted(graph_module):
            raise RefusedError("the model has no adapter to remove")

    def run(self, editor: Editor) -> None:
        erase_lora_nodes(editor)
        for path, adapter in list(all_attached(editor.graph_module)):
            editor.change_modules(owner_path(path, adapter), detach, path)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        if is_adapted(graph_module):
            raise InvariantError("an adapter is left after removing", [(p, "") for p, _ in all_attached(graph_module)])


def erase_lora_nodes(editor: Editor) -> None:
    """Let every user of an adapted output use the base output, and erase the nodes between."""
    added: dict[fx.Node, str] = {}
    for subgraph in list(lora_nodes(editor.graph_module)):
        editor.replace_uses(subgraph.result, subgraph.base, subgraph.path)
        added |= dict.fromkeys(subgraph.between, subgraph.path)
    for node in reversed([node for node in editor.graph.nodes if node in added]):  # calls may share a factor's read
        editor.erase(node, added[node])
