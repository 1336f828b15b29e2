"""What the optimisations will do to a kind of block: seen on its graph, before anything is adapted, or why not."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.adapters.fused.siblings import adapted_siblings
from lora_fx.capture.captured import Captured
from lora_fx.capture.tracing.recording import of_shape
from lora_fx.models.code import UncompiledGraph, copied_graph
from lora_fx.passes import labels as labels_pass
from lora_fx.passes import pack
from lora_fx.passes.afresh import Afresh
from lora_fx.passes.attend import ATTEND, Attend, why_kept
from lora_fx.passes.contract import Pass, apply_pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import Flatten, adapted_output
from lora_fx.passes.halve import HALVE, Halve
from lora_fx.passes.inline import Inline
from lora_fx.passes.lift import Unfit, lifted
from lora_fx.passes.pointwise import is_repeatable, operation
from lora_fx.passes.recompute import Recompute, is_making, shown_by
from lora_fx.passes.stack import Stack, is_adapted_linear
from lora_fx.regions.program import CALLS, COMPILE, LABELS, LIVENESS

_ALONE = "no other adapted layer multiplies its input"
_BETWEEN = "what runs between it and the others on its input is not known to draw and write nothing"
_OUTSIDE = "its input comes from outside of the block"
_DEAR = "making its input again would save too few bytes for its time"


@dataclass(frozen=True, slots=True)
class Foresight:
    """What is foreseen of a block; texts are reasons why not, empty where it will be done."""

    sites: Mapping[str, Mapping[str, str]]
    """By layer, what "stack" and "recompute" will do."""
    block: Mapping[str, str]
    """What is done by its name only; nothing is said of what finds nothing to do: no attention, no tokens."""


def foreseen(
    captured: Captured, module: nn.Module, fused: frozenset[str], others: Mapping[str, str], drops: bool, block: bool
) -> Foresight:
    """Return what will be done to a graph once the layers of these paths are adapted; nothing is changed.

    Args:
        captured: the graph of a block.
        module: the block.
        fused: paths in it of the layers that will compute base and adapter as one operation.
        others: why other adapted layers in it will not, by path.
        drops: whether an adapter in it has a dropout.
        block: whether what is done to the block by name is asked for, too.
    """
    plain = _copied(captured.graph, module)
    apply_pass(Flatten(fused), Editor(plain))
    for step in (Inline(), Afresh()):
        apply_pass(step, Editor(plain))
    fast = _copied(plain.graph, module)
    inputs = {str(n.args[1].target): n.args[0] for n in fast.graph.nodes if is_adapted_linear(n, fast)}
    shared = Counter(inputs.values())
    for usual in (Stack(), Recompute(runs=False)):
        apply_pass(usual, Editor(fast))
    sites: dict[str, dict[str, str]] = {}
    for node in fast.graph.nodes:
        layers = [str(read.target) for read in node.all_input_nodes if read.op == "get_attr" and read.target in inputs]
        stacked = "" if len(layers) > 1 else _ALONE if not layers or shared[inputs[layers[0]]] < 2 else _BETWEEN
        made = "" if is_making(node) else _why_not_made(node) if layers else ""
        sites |= {path: {"stack": stacked, "recompute": made} for path in layers}
    return Foresight(sites, _of_block(plain, fast, module, captured, others, drops) if block else {})


def _copied(graph: fx.Graph, module: nn.Module) -> fx.GraphModule:
    return UncompiledGraph(module, copied_graph(graph))


def _why_not_made(call: fx.Node) -> str:
    """Return why what an adapted layer multiplies is kept."""
    x = shown_by(call.args[0])  # type: ignore[arg-type]
    if x.op == "placeholder":
        return _OUTSIDE
    if is_repeatable(x) or call.target not in (adapted_output, adapted_siblings):
        return _DEAR
    return f"its input is the result of {operation(x) or x.target}, which is no cheap operation"


def _of_block(
    plain: fx.GraphModule,
    fast: fx.GraphModule,
    module: nn.Module,
    captured: Captured,
    others: Mapping[str, str],
    drops: bool,
) -> dict[str, str]:
    attention = why_kept(fast.graph)
    attends, halves = _does(Attend(), fast), _does(Halve(), fast)
    found = ({ATTEND: "" if attends else attention} if attends or attention else {}) | ({HALVE: ""} if halves else {})
    unfused = next((f"{path}: {why}" if path else why for path, why in others.items()), "")
    found[COMPILE] = _reason(lambda: lifted(_stacked(plain, module), captured)) or unfused
    if any(node.target is of_shape for node in plain.graph.nodes):
        return found | {LIVENESS: CALLS}
    packed = _reason(lambda: apply_pass(pack.Pack(captured), Editor(_copied(plain.graph, module))))
    if packed in (pack.NOTHING_MIXED, pack.NO_HIDDEN):
        return found
    if drops:
        return found | {LIVENESS: pack.DRAWS, LABELS: labels_pass.DRAWS}
    return found | {
        LIVENESS: packed,
        LABELS: _reason(lambda: labels_pass.labels_of(plain, captured, "<lora_fx foreseen rows>")),
    }


def _does(step: Pass, graph_module: fx.GraphModule) -> bool:
    """Whether a pass finds something to do; the graph has it then."""
    editor = Editor(graph_module)
    apply_pass(step, editor)
    return editor.journal.modified


def _stacked(graph_module: fx.GraphModule, module: nn.Module) -> fx.GraphModule:
    copied = _copied(graph_module.graph, module)
    apply_pass(Stack(), Editor(copied))
    return copied


def _reason(attempt: Callable[[], Any]) -> str:
    """Return why something cannot be written for a graph; empty if it can."""
    try:
        attempt()
    except (pack.NotPacked, Unfit) as reason:
        return str(reason)
    return ""
