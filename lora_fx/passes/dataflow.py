"""The dataflow of a graph as a networkx.DiGraph, for whatever asks more of it than one step."""

from collections.abc import Callable

import networkx as nx
from torch import fx
from torch.fx.node import map_arg


def dataflow(
    graph: fx.Graph, latest: Callable[[fx.Node, fx.Node], fx.Node] = lambda value, reader: value
) -> nx.DiGraph:
    """Return who reads whose value: an edge from each node to those that read it, all in the order of the graph.

    An edge has `times`, how often the reader has the value among its arguments: y + y reads y twice.  `latest` gives,
    for (value, reader), the statement that made the value which the reader finds; where a graph writes in place, that
    is not the node among its arguments.  The node itself, whose memory it is, is then read 0 times.
    """
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    for reader in graph.nodes:
        values: list[fx.Node] = []
        map_arg((reader.args, reader.kwargs), values.append)
        for value in values:
            made = latest(value, reader)
            for node, times in ((made, 1), (value, 0)):
                known = flow.edges[node, reader]["times"] if flow.has_edge(node, reader) else 0
                flow.add_edge(node, reader, times=known + times)
    return flow


def made_from(flow: nx.DiGraph, node: fx.Node, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Return a node and all that its value is made from, up to those at which to stop, these left out."""
    inside = nx.subgraph_view(flow, filter_node=lambda other: other is node or not stop(other))
    return {node, *nx.ancestors(inside, node)}
