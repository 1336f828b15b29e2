"""halve: what goes into activation functions is kept in bfloat16; only for those who ask for it by its name.

The forward pass keeps its bits.  Gradients are those of a value that is rounded to bfloat16: where the layers' input is
made again in the backward pass (`recompute`) from what other adapted layers put out, as in gelu(h) or silu(gate) · up.
A residual stream, which norms are made from, is kept as it is, and so is what somebody else keeps anyway.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.adapters.fused.siblings import adapted_siblings
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.recompute import is_making

HALVE = "halve"


@dataclass(frozen=True, slots=True)
class Halve(Pass):
    """Keep outputs of adapted layers in bfloat16.  Ensures: the same results; gradients within its rounding."""

    name: str = HALVE

    def run(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if not is_making(node):
                continue
            inputs = node.args[node.target.makes :]
            halved = frozenset(number for number, value in enumerate(inputs) if _may_be_rounded(value, node))
            if halved:
                site = str(node.meta.get("site", ""))
                with editor.writing_after(node, site) as write:
                    made = write.graph.call_function(node.target.halving(halved), node.args)
                editor.replace(node, made, site)


def _may_be_rounded(value: object, user: fx.Node) -> bool:
    """Whether it is an adapted layer's output in float32, which that layer does not keep, and nobody else uses."""
    if not isinstance(value, fx.Node) or value.users.keys() != {user} or "tensor" not in value.meta:
        return False
    if value.meta["tensor"][1] is not torch.float32:
        return False
    if value.target is not operator.getitem:
        return value.target is adapted_output
    call, number = value.args
    if not isinstance(call, fx.Node) or not isinstance(number, int):
        return False
    return call.target is adapted_siblings or (is_making(call) and number < call.target.makes)  # type: ignore[union-attr]
