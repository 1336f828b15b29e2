"""Pictures of diffs: complete, self-contained, within the limits of those who show them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import networkx
import pytest

import lora_fx
from lora_fx.graphdiff.diff import compare
from lora_fx.graphdiff.graphs import Graph, Statement
from lora_fx.graphdiff.render.blocks import blocks_of, boxes_of
from lora_fx.graphdiff.render.layout import HEIGHT, WIDTH, layered
from lora_fx.graphdiff.render.mermaid import fits
from lora_fx.planning.render import page as page_file
from tests.support import zoo
from tests.support.graphs import decoder
from tests.support.htmlpages import Page
from tests.support.zoo import rules


@pytest.fixture(scope="module")
def diff():
    model = zoo.Encoder().eval()
    return lora_fx.diff(model, lora_fx.apply(model, rules("**.{query,value}"), zoo.call_encoder()))


def test_page_is_well_formed_and_asks_nobody_for_anything(diff):
    text = diff.to_html()
    page = Page(text)
    assert not [attributes for _, attributes in page.tags if {"src", "href", "action"} & set(attributes)]
    assert "default-src 'none'" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "{{" not in text


def test_page_shows_each_change_once_with_lines_of_both_sides(diff):
    text = diff.to_html()
    assert text.count("layer.{0..2}.attention.query ×3") == 1
    assert '<span class="d">-    attention_query = self.attention.query(hidden)</span>' in text
    assert "rule 1 · r=4 scaling=4" in text
    paths = json.loads(re.search(r'id="paths">(.*?)</script>', text)[1])
    assert ["layer.0.attention.query", "layer.1.attention.query", "layer.2.attention.query"] in paths


def test_page_of_hostile_names_stays_harmless():
    evil = "</script><script>alert(1)</script>"
    a = decoder(1, nodes=6)
    nodes = tuple(node if k != 2 else type(node)(evil, evil, evil, evil, node.inputs) for k, node in enumerate(a.nodes))
    diff = compare(a, type(a)(evil, nodes, a.weights))
    for text in (diff.to_html(), diff.to_svg()):
        assert "<script>alert" not in text
    Page(diff.to_html())
    ElementTree.fromstring(diff.to_svg())
    assert '"]' in diff.to_mermaid()
    assert "<script" not in diff.to_mermaid()


def test_svg_is_xml_and_says_without_colour_what_differs(diff):
    root = ElementTree.fromstring(diff.to_svg())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "± attention.query" in texts
    assert "layer.{0..2} ×3" in texts
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any("rule 1 · r=4 scaling=4" in title and "float32 [" in title for title in titles)


def test_equal_graphs_give_pictures_that_say_so(diff):
    same = compare(diff.comparison.a, diff.comparison.a)
    assert "no difference" in same.to_svg()
    assert "no difference" in same.to_mermaid()
    assert "No difference" in same.to_html()


def test_mermaid_shows_blocks_with_their_edges(diff):
    chart = diff.to_mermaid()
    assert chart.startswith("flowchart TD\n")
    assert 'subgraph b0["layer.{0..2} ×3"]' in chart
    assert "changed: attention.query" in chart
    assert " --> " in chart
    assert fits(chart)


@pytest.mark.parametrize(("modules", "edges"), [(1, True), (12, True), (60, True), (300, False), (1500, False)])
def test_mermaid_stays_within_the_limits_of_github(modules, edges):
    names = [f"part_{k:x}_of_a_large_model.{kind}" for k in range(modules) for kind in "abcdefgh"]
    x = Statement("", "input", "x", "")
    nodes = [Statement(name, name, "y", f"{name}($0)", (k,)) for k, name in enumerate(names)]
    other = [replace(node, code=f"{node.code} + 1") if node.op.endswith(".c") else node for node in nodes]
    chart = compare(Graph("A", (x, *nodes)), Graph("B", (x, *other))).to_mermaid()
    assert len(chart) <= 50_000
    assert chart.count("-->") <= 500
    assert ("-->" in chart) == edges
    assert ("more" in chart) == (modules == 1500)


def test_page_stays_small_and_says_what_it_leaves_out(monkeypatch):
    a, b = (side_by_side([decoder(1, nodes=20 + k, adapted=adapted) for k in range(40)]) for adapted in (False, True))
    assert "more left out" not in compare(a, b).to_html()
    monkeypatch.setattr(page_file, "MOST_BYTES", 100_000)
    text = compare(a, b).to_html()
    assert len(text.encode()) < 120_000
    assert "more left out" in text
    Page(text)


def side_by_side(graphs: list[Graph]) -> Graph:
    """Return one graph of many, each a block of its own kind."""
    nodes, weights = [], {}
    for k, graph in enumerate(graphs):
        start = len(nodes)
        for node in graph.nodes:
            inputs = tuple(start + i for i in node.inputs)
            path, names = node.path.replace("layers.0", f"layers.{k}"), tuple(f"{k}.{w}" for w in node.weights)
            nodes.append(replace(node, path=path, region=f"layers.{k}", inputs=inputs, weights=names))
        weights |= {f"{k}.{name}": weight for name, weight in graph.weights.items()}
    return Graph("Many", tuple(nodes), weights)


def test_dot_and_graphml_have_every_statement_once(diff):
    blocks = blocks_of(diff.comparison)
    graph = networkx.parse_graphml(diff.to_graphml())
    assert graph.number_of_nodes() == sum(len(block.steps) for block in blocks)
    assert graph.number_of_edges() == sum(len(block.edges) for block in blocks)
    statuses = networkx.get_node_attributes(graph, "status")
    assert sorted(set(statuses.values())) == ["changed", "same"]
    assert diff.to_dot().count("tooltip=") == graph.number_of_nodes()
    assert diff.to_dot().count("{") == diff.to_dot().replace("{0..2}", "").count("}") + diff.to_dot().count("{0..2}")


def test_blocks_of_a_whole_graph_are_found_by_their_numbers():
    diff = compare(decoder(8, nodes=20), decoder(8, adapted=True, nodes=20))
    changed = {tuple(block.paths): block.changed for block in blocks_of(diff.comparison)}
    assert changed == {("",): False, ("layers.0",): True, tuple(f"layers.{k}" for k in range(1, 8)): True}


def test_boxes_stand_below_what_they_are_computed_from_and_never_on_each_other(diff):
    for block in blocks_of(diff.comparison):
        boxes, edges = boxes_of(block)
        corners = layered(len(boxes), edges).corners
        assert all(corners[source][1] < corners[target][1] for source, target in edges)
        for i, (x, y) in enumerate(corners):
            assert all(abs(x - u) >= WIDTH or abs(y - v) >= HEIGHT for u, v in corners[:i])
