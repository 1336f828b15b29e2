"""flatten: calls of linears become plain torch functions on their weights, those of adapted layers one call each.

Only for region graphs, whose guards watch the classes and hooks of the modules that are bypassed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import attached, has_call_factors, shown_parameters
from lora_fx.adapters.trained import holds_rows
from lora_fx.models.layers import has_hooks, kind_of, linear_layout
from lora_fx.models.packed import is_packed
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.sites import first_argument


@dataclass(frozen=True, slots=True)
class Flatten(Pass):
    """Write linears as F.linear.  Ensures: the same operations in the same order."""

    foreseen: frozenset[str] = frozenset()
    """Paths of layers that shall have an adapter and have none yet: to see what other passes will do."""
    name: str = "flatten"

    def run(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.op == "call_module":
                _flatten(editor, node, self.foreseen)


def _flatten(editor: Editor, node: fx.Node, foreseen: Collection[str]) -> None:
    path = str(node.target)
    module = editor.graph_module.get_submodule(path)
    if not is_bypassed(module):
        return
    x = first_argument(node)
    with editor.writing_after(node, str(node.meta.get("site", ""))) as write:
        # an adapter that is added to the output, rather than to a weight that the layer shows
        if path in foreseen or (attached(module) is not None and not shown_parameters(module)):
            flat = write.graph.call_function(adapted_output, (x, write.graph.get_attr(path)))
        elif isinstance(module, nn.Linear) and not is_packed(module):
            arguments = [x, write.graph.create_node("get_attr", f"{path}.weight")]  # get_attr() would ask what is there
            if module.bias is not None:
                arguments.append(write.graph.get_attr(f"{path}.bias"))
            flat = write.graph.call_function(F.linear, tuple(arguments))
        else:
            return
    editor.replace(node, flat, path)


def adapted_output(x: Tensor, layer: Any) -> Tensor:
    """Return what an adapted layer computes; stands in region graphs."""
    result: Tensor = layer.adapted_forward(x)
    return result


def is_bypassed(module: nn.Module) -> bool:
    """Whether a graph computes the module by itself: layers without hooks or tricks."""
    # F.linear with a weight that shows itself with the adapter is all that such a linear computes
    shows_its_weight = "weight" in shown_parameters(module) and linear_layout(type(module)) == "out_in"
    return (shows_its_weight or is_plain_layer(module)) and not has_hooks(module)


def is_plain_layer(module: nn.Module) -> bool:
    """Whether calling the module is all that happens to its weight, and the adapter beside it the same at each call."""
    if shown_parameters(module) or has_call_factors(module) or holds_rows(module):
        return False
    if attached(module) is not None:
        return True
    kind = kind_of(module)
    return kind is not None and kind.called and kind.refusal is None
