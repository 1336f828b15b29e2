"""flatten: calls of linears and of LoRA factors become plain torch functions on their weights.

Only for region graphs, whose guards watch the classes and hooks of the modules that are bypassed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx, nn

from lora_fx.adapters.attach import attached
from lora_fx.adapters.lora import LoRAFactor
from lora_fx.editor import Editor


@dataclass(frozen=True, slots=True)
class Flatten:
    """Write linears as F.linear.  Ensures: the same operations in the same order."""

    name: str = "flatten"

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Any graph will do."""

    def run(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.op == "call_module":
                _flatten(editor, node, editor.graph_module.get_submodule(str(node.target)))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Nothing beyond what the editor checks."""


def _flatten(editor: Editor, node: fx.Node, module: nn.Module) -> None:
    if not is_bypassed(module):
        return
    path = str(node.target)
    with editor.writing_after(node, str(node.meta.get("site", ""))) as write:
        weight = write.graph.get_attr(f"{path}.weight")
        arguments = (*node.args, weight) if node.args else (node.kwargs["input"], weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            arguments = (*arguments, write.graph.get_attr(f"{path}.bias"))
        flat = write.graph.call_function(F.linear, arguments)
    editor.replace_uses(node, flat, path, but=lambda user: False)
    editor.erase(node, path)


def is_bypassed(module: nn.Module) -> bool:
    """Whether `flatten` writes the module as F.linear: linears without hooks or tricks, and factors of their dtype."""
    if isinstance(module, LoRAFactor):
        return module.spec is None or not module.spec.mixed
    if not isinstance(module, nn.Linear) or has_hooks(module) or nn.utils.parametrize.is_parametrized(module):
        return False
    if isinstance(inspect.getattr_static(type(module), "weight", None), property):
        return False  # an effective weight stands in for the parameter
    return attached(module) is not None or type(module).forward is nn.Linear.forward


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
