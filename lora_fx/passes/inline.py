"""inline: torch's own norms and activations become the functions that they call, so that other passes see into them.

Only for region graphs, whose guards watch the classes and hooks of these modules.  Their settings are read from the
module at every call.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from lora_fx.models.layers import has_hooks
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.sites import first_argument

_LAYERS: dict[type[nn.Module], tuple[Callable[..., Any], Mapping[str, str]]] = {
    nn.LayerNorm: (F.layer_norm, {"normalized_shape": "normalized_shape", "weight": "weight", "bias": "bias",
                                  "eps": "eps"}),
    nn.RMSNorm: (F.rms_norm, {"normalized_shape": "normalized_shape", "weight": "weight", "eps": "eps"}),
    nn.GELU: (F.gelu, {"approximate": "approximate"}),
    nn.SiLU: (F.silu, {}),
    nn.Tanh: (F.tanh, {}),
    nn.Sigmoid: (F.sigmoid, {}),
    nn.ReLU: (F.relu, {}),
}  # fmt: skip
"""The function of each, and the attribute that gives each of its arguments."""


@dataclass(frozen=True, slots=True)
class Inline(Pass):
    """Write norms and activations as functions.  Ensures: the same operations in the same order."""

    name: str = "inline"

    def run(self, editor: Editor) -> None:
        for node in list(inlined(editor.graph_module)):
            _inline(editor, node)


def inlined(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the calls of modules that can be written as functions."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if type(module) in _LAYERS and not has_hooks(module) and not getattr(module, "inplace", False):
                yield node


def left_out(module: nn.Module) -> list[str]:
    """Return the attributes that the function of a module is not given, because they are None."""
    _, arguments = _LAYERS.get(type(module), (None, {}))
    return [attribute for attribute in arguments.values() if getattr(module, attribute) is None]


def _inline(editor: Editor, node: fx.Node) -> None:
    path = str(node.target)
    module = editor.graph_module.get_submodule(path)
    function, arguments = _LAYERS[type(module)]
    with editor.writing_after(node, path) as write:
        given: dict[str, Any] = {
            name: write.graph.create_node("get_attr", f"{path}.{attribute}")
            for name, attribute in arguments.items()
            if getattr(module, attribute) is not None
        }
        flat = write.graph.call_function(function, (first_argument(node),), given)
    editor.replace(node, flat, path)
