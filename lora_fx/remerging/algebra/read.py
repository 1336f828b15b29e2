"""Reads a graph as mathematics, with all operations that are known."""

from collections.abc import Mapping

from torch import fx, nn

from lora_fx.remerging.algebra.affine import AFFINE_OPERATIONS
from lora_fx.remerging.algebra.constants import CONSTANT_OPERATIONS
from lora_fx.remerging.algebra.reading import GraphReading, Operations

_OPERATIONS = Operations(AFFINE_OPERATIONS, CONSTANT_OPERATIONS)


def read_graph(root: nn.Module, graph: fx.Graph, names: Mapping[int, str] | None = None) -> GraphReading:
    """Return a graph read as mathematics; neither graph nor tensors are changed.

    Args:
        root: holds the modules and tensors that the graph names.
        graph: of calls on them.
        names: of tensors by identity, where the graph's own names are unusable.
    """
    return GraphReading(root, graph, _OPERATIONS, names or {})
