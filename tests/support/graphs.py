"""Graphs made up for the tests of the diff: random ones, edits of them, and a large decoder."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import strategies as st

from lora_fx.graphdiff.graphs import INPUT, RETURN, Graph, Statement, Weight

OPERATIONS = ("add", "mul", "relu", "linear", ".view")
PATHS = ("", "layers.0", "layers.0.q", "layers.1", "layers.1.q", "head")


def node(path: str, op: str, inputs: tuple[int, ...], constant: int = 0, weight: str = "") -> Statement:
    shown = ", ".join([*(f"${k}" for k in range(len(inputs))), *([f"self.{weight}"] if weight else []), str(constant)])
    weights = (weight,) if weight else ()
    return Statement(path, op, op.strip("."), f"{op}({shown})", inputs, weights=weights, flops=8 if weight else 0)


def graph_from(generator: random.Random, length: int) -> Graph:
    """Return a random graph: an input, nodes that use earlier ones, a return."""
    nodes = [Statement("", INPUT, "x", "")]
    weights: dict[str, Weight] = {}
    for position in range(1, length):
        path, op = generator.choice(PATHS), generator.choice(OPERATIONS)
        inputs = tuple(generator.randrange(max(0, position - 6), position) for _ in range(1 + (op in ("add", "mul"))))
        weight = f"{path}.weight" if op == "linear" and path else ""
        if weight:
            weights[weight] = Weight((4, generator.choice((4, 8))) if weight not in weights else weights[weight].shape, "float32")  # fmt: skip
        nodes.append(node(path, op, inputs, generator.randrange(3), weight))
    nodes.append(Statement("", RETURN, "", "return $0", (length - 1,)))
    return Graph("Made", tuple(nodes), weights, sum(w.parameters for w in weights.values()))


def edited(generator: random.Random, graph: Graph, edits: int) -> Graph:
    """Return the graph with that many nodes inserted, dropped, changed or moved to another module."""
    for _ in range(edits):
        position = generator.randrange(1, max(2, len(graph.nodes) - 1))
        kind = generator.choice(("insert", "drop", "change", "move"))
        if kind == "insert":
            graph = inserted(graph, position, node(generator.choice(PATHS), "relu", (position - 1,), 7))
        elif kind == "drop" and len(graph.nodes) > 4:
            graph = dropped(graph, position)
        else:
            old = graph.nodes[position]
            change = {"code": f"{old.code} + 1"} if kind == "change" else {"path": generator.choice(PATHS)}
            nodes = (*graph.nodes[:position], replace(old, **change), *graph.nodes[position + 1 :])
            graph = replace(graph, nodes=nodes)
    return graph


def inserted(graph: Graph, position: int, new: Statement) -> Graph:
    """Return the graph with a node between; what used the one before it uses it instead, here and there."""
    rest = [replace(node, inputs=tuple(i + (i >= position) for i in node.inputs)) for node in graph.nodes[position:]]
    if rest and rest[0].inputs:
        rest[0] = replace(rest[0], inputs=(position, *rest[0].inputs[1:]))
    return replace(graph, nodes=(*graph.nodes[:position], new, *rest))


def dropped(graph: Graph, position: int) -> Graph:
    """Return the graph without a node; its users use what it used."""
    source = graph.nodes[position].inputs[0] if graph.nodes[position].inputs else 0
    to = lambda i: source if i == position else i - (i > position)  # noqa: E731
    rest = tuple(replace(node, inputs=tuple(map(to, node.inputs))) for node in graph.nodes[position + 1 :])
    return replace(graph, nodes=(*graph.nodes[:position], *rest))


def renamed(graph: Graph) -> Graph:
    """Return the graph as torch.fx might have named it: that is, with its results in another region of names."""
    return replace(graph, nodes=tuple(replace(node, value=f"float32 [{k}]") for k, node in enumerate(graph.nodes)))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    seed, length = draw(st.integers(0, 2**32)), draw(st.integers(2, 40))
    return graph_from(random.Random(seed), length)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Graph, Graph]:
    """Draw two graphs, the second an edited first or an unrelated one."""
    one, generator = draw(graphs()), random.Random(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return one, edited(generator, one, draw(st.integers(1, 8)))
    return one, draw(graphs())


def decoder(
    layers: int, width: int = 64, adapted: bool = False, nodes: int = 100, ranks: tuple[int, ...] = (8,)
) -> Graph:
    """Return a decoder's graph with `nodes` statements a layer, LoRA on q and v; one graph as a whole, no regions."""
    statements, weights = [Statement("", INPUT, "input_ids", "")], {}
    for layer in range(layers):
        r = ranks[layer % len(ranks)]
        for k in range(nodes):
            path, before = f"layers.{layer}", len(statements) - 1
            name = {0: "self_attn.q_proj", 1: "self_attn.k_proj", 2: "self_attn.v_proj"}.get(k)
            if name is None:
                module = f"{path}.mlp" if k > nodes // 2 else f"{path}.self_attn"
                second = max(0, before - 3)
                statements.append(
                    Statement(module, f"op{k % 17}", f"op{k % 17}", f"op{k % 17}($0, $1)", (before, second))
                )
                continue
            base, low = f"{path}.{name}", f"self.{path}.{name}.lora_"
            read = {f"{base}.weight": Weight((width, width), "float32")}
            code, rule, flops = f"self.{base}($0)", "", 2 * width**2
            if adapted and k != 1:
                code, rule, flops = f"{code} + {low}B({low}A($0) * 2.0)", f"rule attention · r={r} scaling=2", flops + 4 * r * width  # fmt: skip
                read |= {f"{base}.lora_A.default.weight": Weight((r, width), "float32")}
                read |= {f"{base}.lora_B.default.weight": Weight((width, r), "float32")}
            weights |= read
            name = base.rpartition(".")[2]
            statements.append(
                Statement(base, "Linear", name, code, (before,), weights=tuple(read), rule=rule, flops=flops)
            )
    statements.append(Statement("", RETURN, "", "return $0", (len(statements) - 1,)))
    total = sum(weight.parameters for weight in weights.values())
    return Graph("Decoder", tuple(statements), weights, total, sum(weight.bytes for weight in weights.values()))
