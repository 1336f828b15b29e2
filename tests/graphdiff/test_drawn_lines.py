"""The lines of a drawn block: each joins its two boxes, runs through none, and few cross."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

import lora_fx
from lora_fx.graphdiff.diff import GraphDiff, compare
from lora_fx.graphdiff.graphs import Graph
from lora_fx.graphdiff.render import lanes as lanes_file
from lora_fx.graphdiff.render.blocks import Block, Step, blocks_of, boxes_of
from lora_fx.graphdiff.render.columns import columns
from lora_fx.graphdiff.render.crossings import crossings, ordered
from lora_fx.graphdiff.render.lanes import layers_of
from lora_fx.graphdiff.render.layout import HEIGHT, WIDTH, layered
from lora_fx.graphdiff.render.svg import drawing
from tests.support import zoo
from tests.support.drawn import ends, trespassing
from tests.support.graphs import decoder, edited, graph_from
from tests.support.kept import kept


def llama() -> GraphDiff:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return lora_fx.diff(model, lora_fx.apply(model, "attention"))


def of_zoo(specimen: zoo.Specimen) -> GraphDiff:
    model, sample = specimen.build(), specimen.sample()
    return lora_fx.diff(model, lora_fx.apply(model, zoo.rules(specimen.rule), sample))


def random_pair(seed: int) -> GraphDiff:
    generator = random.Random(seed)
    graph = graph_from(generator, 40)
    return compare(graph, edited(generator, graph, 12))


DRAWN = ("mlp", "encoder", "encoder-no-mask", "gpt", "mixer", "nn.TransformerEncoder")
MADE = {
    "llama": llama,
    **{specimen.name: lambda specimen=specimen: of_zoo(specimen) for specimen in zoo.ZOO if specimen.name in DRAWN},
    "large": lambda: compare(decoder(2, nodes=300), decoder(2, nodes=300, adapted=True)),
    **{f"random {seed}": lambda seed=seed: random_pair(seed) for seed in range(12)},
}


@kept
def made(name: str) -> GraphDiff:
    return MADE[name]()


def block_of(number: int, edges: dict[tuple[int, int], str]) -> Block:
    """Return a block whose boxes are its statements."""
    steps = [Step("same", f"m{k}", "op", f"m{k}()", f"m{k}()", "", "") for k in range(number)]
    return Block(["block"], steps, edges)


@pytest.mark.parametrize("name", MADE)
def test_lines_join_their_boxes_and_run_through_none(name):
    torch.manual_seed(0)
    blocks = blocks_of(made(name).comparison)
    assert any(block.edges for block in blocks)
    for block in blocks:
        drawn, layout = drawing(block)
        assert trespassing(drawn) == []
        assert sorted(ends(drawn)) == sorted(boxes_of(block)[1])
        assert all(0 <= x <= layout.width - WIDTH and 0 <= y <= layout.height - HEIGHT for x, y in layout.corners)


def test_a_line_through_a_box_is_found():
    drawn, _ = drawing(block_of(3, {(0, 1): "same", (1, 2): "same"}))
    assert trespassing(drawn) == []
    (x, y), (_, below) = layered(3, {(0, 1): "same", (1, 2): "same"}).corners[::2]
    straight = f'<path class="edge same" d="M{x + WIDTH / 2} {y + HEIGHT}V{below}"/>'
    bend = f'<path class="edge same" d="M{x + 50} {y + HEIGHT}C{x + 90} {y + 60} {x + 90} {y + 60} {x + 50} {below}"/>'
    assert trespassing(straight + drawn) == [0]
    assert trespassing(bend + drawn) == [0]
    assert ends(f'<path class="edge" d="M0 0V1"/>{drawn}')[0] == (-1, -1)


def test_long_lines_that_have_no_room_between_boxes_go_around_them(monkeypatch):
    edges = {(k, k + 1): "same" for k in range(11)} | {(k, k + 6): "same" for k in range(6)} | {(9, 1): "removed"}
    inside, _ = drawing(block_of(12, edges))
    monkeypatch.setattr(lanes_file, "_MOST_LANES", 5)
    around, layout = drawing(block_of(12, edges))
    for drawn in (inside, around):
        assert trespassing(drawn) == []
        assert sorted(ends(drawn)) == sorted(edges)
    assert sum(max(x for x, _, _ in line) > WIDTH + 30 for line in layout.lines.values()) >= 5
    assert all(x < layout.width for line in layout.lines.values() for x, _, _ in line)


def test_a_line_to_a_box_before_ends_with_an_arrow():
    drawn, _ = drawing(block_of(3, {(0, 1): "same", (1, 2): "added", (2, 0): "removed"}))
    assert drawn.count("m-4 7l4-7l4 7") == 1
    assert ends(drawn)[-1] == (2, 0)


def test_lines_of_one_value_run_together_and_lines_of_another_kind_beside_them():
    layout = layered(
        5, {(0, 1): "same", (1, 2): "same", (2, 3): "same", (3, 4): "same", (0, 3): "same", (0, 4): "same"}
    )
    near, far = layout.lines[0, 3], layout.lines[0, 4]
    assert near[1][:2] == far[1][:2]
    other = layered(
        5, {(0, 1): "same", (1, 2): "same", (2, 3): "same", (3, 4): "same", (0, 3): "same", (0, 4): "added"}
    )
    assert other.lines[0, 3][1][0] != other.lines[0, 4][1][0]


def test_crossings_are_counted_and_taken_away():
    layers = layers_of(4, {(0, 3): "same", (1, 2): "same"})
    assert crossings(layers, [[0, 1], [2, 3]]) == 1
    assert crossings(layers, ordered(layers)) == 0
    # a tree that is given in the worst order
    tree = layers_of(7, {(0, 5): "", (0, 3): "", (1, 4): "", (1, 6): "", (0, 2): "", (2, 6): ""})
    assert crossings(tree, ordered(tree)) == 0


def test_long_lines_go_straight_and_a_chain_stands_in_one_column():
    edges = {(k, k + 1): "same" for k in range(19)} | {(0, 19): "same"}
    layout = layered(20, edges)
    assert len({x for x, _ in layout.corners}) == 1
    assert len(layout.lines[0, 19]) == 3
    assert layout.width < WIDTH + 100


@pytest.mark.parametrize(("name", "most"), [("llama", 1), ("encoder", 3), ("gpt", 0), ("mixer", 0), ("large", 0)])
def test_few_lines_cross_and_pictures_stay_small(name, most):
    torch.manual_seed(0)
    for block in blocks_of(made(name).comparison):
        boxes, edges = boxes_of(block)
        layers, layout = layers_of(len(boxes), edges), layered(len(boxes), edges)
        assert crossings(layers, ordered(layers)) <= most
        widest = max(sum(one < layers.boxes for one in row) for row in layers.rows)
        assert layout.width <= 2 * widest * (WIDTH + 20) + 400
        assert layout.height <= len(layers.rows) * 120 + 40


def test_equal_blocks_give_equal_pictures_whatever_the_order_of_their_edges():
    generator = random.Random(0)
    edges = {(k, generator.randrange(k + 1, 60)): "same" for k in range(59) for _ in range(3)}
    shuffled = list(edges.items())
    generator.shuffle(shuffled)
    assert layered(60, edges) == layered(60, dict(shuffled))


def test_places_keep_their_order_and_their_distance():
    generator = random.Random(1)
    for _ in range(20):
        edges = {(k, generator.randrange(k + 1, 40)): generator.choice("ab") for k in range(39) for _ in range(2)}
        layers = layers_of(40, edges)
        rows = ordered(layers)
        widths = [WIDTH if one < 40 else 12 for one in range(len(layers.row))]
        middles = columns(layers, rows, widths)
        for row in rows:
            for left, right in pairwise(row):
                assert middles[right] - middles[left] >= (widths[left] + widths[right]) / 2


def test_a_graph_of_nothing_has_an_empty_picture():
    assert layered(0, {}).corners == []
    assert compare(Graph("A", ()), Graph("B", ())).to_svg()
