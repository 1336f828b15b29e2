"""A GraphDiff for other tools: both graphs as one networkx graph, in Graphviz's language, and in GraphML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lora_fx.graphdiff.compare import GraphDiff
from lora_fx.graphdiff.render.blocks import SYMBOLS, blocks_of
from lora_fx.graphdiff.render.svg import title_of

_LOOKS = {
    "same": "",
    "changed": ",color=orange4,penwidth=3",
    "added": ",color=darkgreen,penwidth=3",
    "removed": ",color=red4,style=dashed",
    "moved": ",color=orange4,style=dotted",
}


def diff_networkx(diff: GraphDiff) -> Any:
    """Return a networkx.DiGraph of both sides; each kind of block once, with the blocks that are alike as `blocks`."""
    import networkx

    graph = networkx.DiGraph(a=diff.a, b=diff.b)
    for number, block in enumerate(blocks_of(diff._compared)):
        for i, step in enumerate(block.steps):
            graph.add_node(f"b{number}_{i}", **asdict(step), label=step.label, blocks=title_of(block))
        for (source, target), status in block.edges.items():
            graph.add_edge(f"b{number}_{source}", f"b{number}_{target}", status=status)
    return graph


def diff_graphml(diff: GraphDiff) -> str:
    """Return the graph in GraphML."""
    import networkx

    return "\n".join(networkx.generate_graphml(diff_networkx(diff)))


def diff_dot(diff: GraphDiff) -> str:
    """Return the graph in Graphviz's language, a cluster for each kind of block."""
    graph = diff_networkx(diff)
    clusters: dict[str, list[str]] = {}
    for name, facts in graph.nodes(data=True):
        clusters.setdefault(facts["blocks"], []).append(name)
    lines = ["digraph diff {", "  node [shape=box, fontname=monospace];"]
    for number, (title, names) in enumerate(clusters.items()):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(title)};"]
        lines += [f"    {line}" for name in names for line in _node(name, graph.nodes[name])]
        lines.append("  }")
    for source, target, facts in graph.edges(data=True):
        look = _LOOKS[facts["status"]].lstrip(",")
        lines.append(f"  {source} -> {target}" + (f" [{look}];" if look else ";"))
    return "\n".join([*lines, "}"])


def _node(name: str, facts: dict[str, str]) -> Iterator[str]:
    sign = SYMBOLS[facts["status"]]
    label = "\n".join(filter(None, (f"{sign} {facts['label']}".strip(), facts["op"], facts["rule"])))
    tip = "\n".join(filter(None, (facts["before"], facts["after"], facts["value"])))
    yield f"{name} [label={_quoted(label)},tooltip={_quoted(tip)}{_LOOKS[facts['status']]}];"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
