"""flatten: calls of linears and of LoRA factors become plain torch functions on their weights.

Only for region graphs, whose guards watch the classes and hooks of the modules that are bypassed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx, nn

from lora_fx.adapters.attach import attached, base_weight_name, shows_effective_weight
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
        weight = write.graph.get_attr(f"{path}.{base_weight_name(module)}")
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
    return is_plain_linear(module) and not has_hooks(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's forward is F.linear of its own weight (and the adapter beside it)."""
    if not isinstance(module, nn.Linear) or nn.utils.parametrize.is_parametrized(module):
        return False
    if attached(module) is not None:
        return True
    return type(module).forward is nn.Linear.forward and not shows_effective_weight(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
