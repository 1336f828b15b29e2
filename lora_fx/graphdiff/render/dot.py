"""A GraphDiff for other tools: both graphs as one networkx graph, in Graphviz's language, and in GraphML.

networkx is imported where it is used: that takes 0.25 s, for which a diff as text need not wait.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from lora_fx.graphdiff.changes import GraphDifference
from lora_fx.graphdiff.render.blocks import SYMBOLS, blocks_of
from lora_fx.graphdiff.render.svg import title_of
from lora_fx.planning.render.dot import digraph, quoted
from lora_fx.text import visible

if TYPE_CHECKING:
    import networkx as nx

_LOOKS = {
    "same": "",
    "changed": "color=orange4,penwidth=3",
    "added": "color=darkgreen,penwidth=3",
    "removed": "color=red4,style=dashed",
    "moved": "color=orange4,style=dotted",
}


def diff_networkx(diff: GraphDifference) -> "nx.DiGraph":
    """Return a graph of both sides; each kind of block once, with the blocks that are alike as `blocks`."""
    import networkx as nx

    graph = nx.DiGraph(a=visible(diff.a), b=visible(diff.b))
    for number, block in enumerate(blocks_of(diff.compared)):
        for i, step in enumerate(block.steps):
            graph.add_node(f"b{number}_{i}", **asdict(step), label=step.label, blocks=title_of(block))
        for (source, target), status in block.edges.items():
            graph.add_edge(f"b{number}_{source}", f"b{number}_{target}", status=status)
    return graph


def diff_graphml(diff: GraphDifference) -> str:
    """Return the graph in GraphML."""
    import networkx as nx

    return "\n".join(nx.generate_graphml(diff_networkx(diff)))


def diff_dot(diff: GraphDifference) -> str:
    """Return the graph in Graphviz's language, a cluster for each kind of block."""
    graph = diff_networkx(diff)
    clusters: dict[str, list[str]] = {}
    for name, facts in graph.nodes(data=True):
        clusters.setdefault(facts["blocks"], []).append(f"    {name} [{_attributes(facts)}];")
    lines = ["  node [shape=box, fontname=monospace];"]
    for number, (title, statements) in enumerate(clusters.items()):
        lines += [f"  subgraph cluster_{number} {{", f"    label={quoted(title)};", *statements, "  }"]
    for source, target, status in graph.edges(data="status"):
        look = f" [{_LOOKS[status]}]" if _LOOKS[status] else ""
        lines.append(f"  {source} -> {target}{look};")
    return digraph("diff", lines)


def _attributes(facts: Mapping[str, str]) -> str:
    sign = SYMBOLS[facts["status"]]
    label = "\n".join(filter(None, (f"{sign} {facts['label']}".strip(), facts["op"], facts["rule"])))
    tip = "\n".join(filter(None, (facts["before"], facts["after"], facts["value"])))
    return ",".join(filter(None, (f"label={quoted(label)}", f"tooltip={quoted(tip)}", _LOOKS[facts["status"]])))
