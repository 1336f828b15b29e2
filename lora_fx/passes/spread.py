"""spread: what processes send around a layer that is split over them is sent by the graph, which calls no layer.

Siblings on one input get one node for it, so that their gradients are added up over the processes at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.capture.captured import NotCaptured
from lora_fx.models.parts import PART, from_parts, into_parts
from lora_fx.models.walking import named_modules_of
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.sites import first_argument


def split_layers(module: nn.Module) -> frozenset[str]:
    """Return the paths of the layers in a module of which this process computes a part."""
    return frozenset(path for path, inner in named_modules_of(module) if PART in vars(inner))


@dataclass(frozen=True, slots=True)
class Spread(Pass):
    """Send around calls of split layers.  Ensures: the same results, where nobody sends.

    Raises NotCaptured where a split layer is used in another way than by a call of its own.
    """

    layers: frozenset[str]
    """Paths of the split ones."""
    name: str = "spread"

    def run(self, editor: Editor) -> None:
        entered: dict[fx.Node, fx.Node] = {}
        for node in list(editor.graph.nodes):
            if node.op in ("call_module", "get_attr"):
                self._refuse_inside(node)
            if node.op == "call_module" and str(node.target) in self.layers:
                _spread(editor, node, entered)

    def _refuse_inside(self, node: fx.Node) -> None:
        target = str(node.target)
        below = [] if node.op == "call_module" else list(_prefixes(target))
        inside = [path for path in self.layers if path.startswith(f"{target}.") or path in below]
        if inside:
            what = "called as a whole" if node.op == "call_module" else "read"
            raise NotCaptured(f"{target} is {what}, and processes share {inside[0]}")


def _prefixes(target: str) -> Iterator[str]:
    while target:
        target = target.rpartition(".")[0]
        yield target


def _spread(editor: Editor, node: fx.Node, entered: dict[fx.Node, fx.Node]) -> None:
    path = str(node.target)
    layer: Any = editor.graph_module.get_submodule(path)
    part = vars(layer)[PART]
    x = first_argument(node)
    if part.along_outputs:
        if x not in entered:
            with editor.writing_after(node.prev, path) as write:
                entered[x] = write.graph.call_function(into_parts, (x, write.graph.get_attr(path)))
            entered[x].meta.update({key: x.meta[key] for key in ("tensor", "bytes") if key in x.meta})
        editor.replace_operand(node, x, entered[x], path)
        return
    with editor.writing_after(node, path) as write:
        total = write.graph.call_function(from_parts, (node, write.graph.get_attr(path)))
    total.meta.update({key: node.meta[key] for key in ("tensor", "bytes") if key in node.meta})
    editor.replace_uses(node, total, path, but=lambda user: user is total)
