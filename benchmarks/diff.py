"""Print how long diffs of large graphs take: `python benchmarks/diff.py`."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lora_fx

sys.path.insert(0, str(Path(__file__).parent.parent))
from lora_fx.graphdiff.diff import GraphDiff, compare
from lora_fx.graphdiff.graphs import Graph, Weight
from tests.support.graphs import decoder, edited

WIDTH, LAYERS = 64, 96


def timed(what: str, make: Callable[[], object]) -> object:
    started = time.perf_counter()
    made = make()
    print(f"{what:<58} {time.perf_counter() - started:6.2f} s")
    return made


def decoders() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a decoder of 96 layers, with norms of queries and keys, and the same adapted."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=100, sliding_window=16, layer_types=["full_attention"] * LAYERS,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    rules = {"version": 1, "rules": [{"name": "attention", "match": {"name": "**.{q,k,v,o}_proj"}, "lora": {"r": 8}}]}
    inputs = {"input_ids": torch.randint(0, 100, (2, 7))}
    return model, timed(f"apply to {LAYERS} layers (captures)", lambda: lora_fx.apply(model, rules, inputs))


def forms(diff: GraphDiff) -> None:
    for name in ("to_json", "to_html", "to_svg", "to_mermaid", "to_dot", "to_graphml"):
        text = timed(f"  {name}", getattr(diff, name))
        print(f"{'':<58} {len(text.encode()) / 1000:6.0f} kB")


def scattered(graph: Graph, edits: int) -> Graph:
    """Return the graph with nodes inserted, dropped, changed and moved all over."""
    made = edited(random.Random(0), graph, edits)
    known = {name: made.weights.get(name, Weight((4, 4), "float32")) for node in made.nodes for name in node.weights}
    return Graph("Edited", made.nodes, known)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tuned = decoders()
    diff = timed("diff of base and adapted, all in", lambda: lora_fx.diff(model, tuned))
    assert diff.comparison is not None
    sizes = [len(graph.nodes) for graph in (diff.comparison.a, diff.comparison.b)]
    print(f"  nodes: {sizes}, {len(diff.changes)} sites changed, {len(str(diff).splitlines())} lines of text")
    timed("  of that, comparing", lambda: compare(diff.comparison.a, diff.comparison.b))
    forms(diff)
    for nodes in (12_500, 25_000, 50_000, 100_000):
        a, b = (decoder(nodes // 100, adapted=adapted) for adapted in (False, True))
        compared = timed(f"synthetic pair of {len(a.nodes):,} nodes, adapted in every layer", lambda: compare(a, b))  # noqa: B023
        assert len(compared.changes) == 2 * (nodes // 100)
    a = decoder(500)
    b = scattered(a, 500)
    compared = timed(f"synthetic pair of {len(a.nodes):,} nodes, 500 edits all over", lambda: compare(a, b))
    print(f"  {len(compared.comparison.edits)} edits reported")
    forms(compared)
    started = time.perf_counter()
    deltas = lora_fx.deltas(tuned)
    print(f"deltas of {len(deltas.sites)} adapters {time.perf_counter() - started:40.2f} s")


if __name__ == "__main__":
    main()
