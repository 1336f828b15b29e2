"""What only looks like a LoRA, so that it is worth a word why it is left alone."""

import math

from torch import fx

from lora_fx.passes.dataflow import made_from
from lora_fx.remerging.algebra.affine import convolution_weight, linear_parameters
from lora_fx.remerging.algebra.chains import Matrix, WeightPart
from lora_fx.remerging.algebra.operations import GraphCall, NotLinear
from lora_fx.remerging.algebra.reading import GraphReading

LINEARS = ("linear", "matmul", "addmm", "conv")
_FARTHEST = 24
"""As many nodes are looked at on the way back from a sum."""


def path_of(part: WeightPart) -> str:
    """Return where a weight stands: the path of its module, or its own name."""
    path, _, name = part.name.rpartition(".")
    return path if name == "weight" and path else part.name


def cone_of(read: GraphReading, node: fx.Node, x: fx.Node | None) -> frozenset[fx.Node]:
    """Return the nodes that compute a value from x and from parameters."""
    return frozenset(made_from(read.flow, node, lambda other: other is x or other.op == "placeholder"))


def made_with_product(read: GraphReading, node: fx.Node) -> str | None:
    """Return where the weight stands that a constant is made of, if a product of low rank goes into it too."""
    has_product, stored = False, list[Matrix]()
    for source in sorted(cone_of(read, node, None), key=read.order.__getitem__):
        try:
            value = read.constant(source)
        except NotLinear:
            continue
        if value is None or len(value.shape) < 2:
            continue
        has_product = has_product or any(chain.is_low_rank for chain in value.chains)
        stored += [value] if source.op == "get_attr" else []
    if not has_product or not stored:
        return None
    part = max(stored, key=lambda value: math.prod(value.shape)).chains[0].part
    return None if part is None else path_of(part)


def looks_like_lora(read: GraphReading, node: fx.Node, x: fx.Node, linear: tuple[int, int], reason: NotLinear) -> bool:
    """Whether an addend that is not a LoRA is worth a word: two matrices through few dimensions beside a linear.

    Args:
        read: the graph.
        node: the addend.
        x: the linear's input.
        linear: its (columns of the input, columns of the output); a convolution's channels.
        reason: why the addend is not a LoRA.
    """
    shapes, end = _matrices_above(read, node, x)
    if len(shapes) < 2:
        return False
    (inner, _, out), (_, into, rank) = shapes[0], shapes[1]
    if into != linear[0] or inner != rank or out not in (linear[1], 1):
        return False
    if rank >= max(linear):
        return reason.reason.startswith("its inner dimension")
    return end is x or reason.reason.startswith("its input is")


def _matrices_above(read: GraphReading, node: fx.Node, x: fx.Node) -> tuple[list[tuple[int, int, int]], fx.Node]:
    """Return the shapes of the matrices on the way from a value back to x, the last first, and where the way ends.

    (rows, columns or channels of the input, columns of the output) of each.
    """
    shapes: list[tuple[int, int, int]] = []
    for _ in range(_FARTHEST):
        call = read.calls.get(node)
        if node is x or call is None:
            break
        if call.op in LINEARS:
            shapes += _shape(read, call)
        inputs = [read.latest(source, node) for source in node.all_input_nodes]
        inputs = [source for source in inputs if not read.is_constant(source)]
        if not inputs:
            break
        node = next((source for source in inputs if _leads_to_matrix(read, source)), inputs[0])
    return shapes, node


def _leads_to_matrix(read: GraphReading, node: fx.Node) -> bool:
    """Whether one of the next few nodes on the way back is a linear."""
    for _ in range(4):
        call = read.calls.get(node)
        if call is None:
            return False
        if call.op in LINEARS:
            return True
        node = call.node.all_input_nodes[0] if call.node.all_input_nodes else node
    return False


def _shape(read: GraphReading, call: GraphCall) -> list[tuple[int, int, int]]:
    try:
        if call.op == "conv":
            out, channels, *kernel = convolution_weight(read, call).shape
            return [(channels * call.get("groups", 1) * math.prod(kernel), channels * call.get("groups", 1), out)]
        into, out = linear_parameters(read, call)[0].shape
    except NotLinear:
        return []
    return [(into, into, out)]
