"""diff, whatever the graphs: empty for equal ones, exact in its edits, mirrored when they are swapped."""

from __future__ import annotations

import dataclasses
import itertools
import json

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.graphdiff.align import common_subsequence, increasing
from lora_fx.graphdiff.diff import compare
from lora_fx.graphdiff.graphs import Graph, GraphFileError, Statement
from tests.support.graphs import decoder, graphs, inserted, node, pairs, renamed

COMPARED = ("path", "op", "name", "code", "inputs", "region", "weights")


def facts(graph: Graph) -> list[tuple[object, ...]]:
    return [tuple(getattr(statement, name) for name in COMPARED) for statement in graph.nodes]


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_a_graph_does_not_differ_from_itself(graph):
    diff = compare(graph, graph)
    assert not diff
    assert diff.unchanged == graph.statements


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_sizes_of_results_are_shown_and_not_compared(graph):
    assert not compare(graph, renamed(graph))


@given(pairs())
@settings(max_examples=300, deadline=None)
def test_the_reported_edits_turn_a_into_b(pair):
    a, b = pair
    made = compare(a, b).applied_to(a)
    assert facts(made) == facts(b)
    assert {name: made.weights[name] for statement in b.nodes for name in statement.weights} == {
        name: b.weights[name] for statement in b.nodes for name in statement.weights
    }


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_the_diff_is_mirrored_when_the_sides_are_swapped(pair):
    there, back = compare(*pair), compare(*pair[::-1])
    mirrored = {
        (c.path, None, c.added, c.removed) if c.moved_from is None else (c.moved_from, c.path, c.added, c.removed)
        for c in back.changes
    }
    assert {(c.path, c.moved_from, c.removed, c.added) for c in there.changes} == mirrored
    assert there.unchanged == back.unchanged
    assert (there.parameters, there.flops) == (back.parameters[::-1], back.flops[::-1])


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_an_empty_diff_means_isomorphic_graphs(pair):
    a, b = pair
    if not compare(a, b):
        same = networkx.algorithms.isomorphism.categorical_node_match("code", "")
        assert networkx.is_isomorphic(as_networkx(a), as_networkx(b), node_match=same)
        assert facts(a) == facts(b)


def as_networkx(graph: Graph) -> networkx.MultiDiGraph:
    made = networkx.MultiDiGraph()
    for position, statement in enumerate(graph.nodes):
        made.add_node(position, code=statement.code)
        made.add_edges_from((source, position) for source in statement.inputs)
    return made


@given(graphs(), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_one_inserted_node_is_one_change(graph, position):
    position = min(position, len(graph.nodes) - 1)
    longer = inserted(graph, position, node("new.module", "dropout", (position - 1,)))
    edits = compare(graph, longer).comparison.edits
    assert [edit.after for edit in edits if edit.before is None] == [position]
    assert len(edits) <= 2  # the new one, and the one that uses it now


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_a_saved_graph_is_read_back_as_it_was(graph):
    assert Graph.from_json(graph.to_json()) == graph


@given(pairs())
@settings(max_examples=50, deadline=None)
def test_every_form_can_be_made_of_every_diff(pair):
    diff = compare(*pair)
    assert json.loads(diff.to_json())["changes"] == json.loads(
        json.dumps([dataclasses.asdict(c) for c in diff.changes])
    )
    assert len(json.loads(diff.to_json())["edits"]) == len(diff.comparison.edits)
    for form in (str(diff), diff.to_html(), diff.to_svg(), diff.to_mermaid(), diff.to_dot(), diff.to_graphml()):
        assert form


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
@settings(max_examples=200, deadline=None)
def test_common_subsequence_is_a_longest_one(a, b):
    common = common_subsequence(a, b)
    assert all(a[i] == b[j] for i, j in common)
    assert all(i < k and j < m for (i, j), (k, m) in itertools.pairwise(common))
    lengths = {(i, j): 0 for i in range(-1, len(a)) for j in range(-1, len(b))}
    for i in range(len(a)):
        for j in range(len(b)):
            lengths[i, j] = max(lengths[i - 1, j], lengths[i, j - 1], lengths[i - 1, j - 1] + (a[i] == b[j]))
    assert len(common) == lengths[len(a) - 1, len(b) - 1]


@given(st.lists(st.integers(0, 50), unique=True, max_size=20))
@settings(max_examples=200, deadline=None)
def test_increasing_is_a_longest_increasing_subsequence(values):
    longest = increasing(values)
    assert [values[i] for i in longest] == sorted(values[i] for i in longest)
    best: list[int] = []
    for i, value in enumerate(values):
        best.append(1 + max((best[k] for k in range(i) if values[k] < value), default=0))
    assert len(longest) == max(best, default=0)


def test_blocks_of_a_renamed_module_are_found_as_moved():
    a = decoder(6, nodes=10)
    nodes = tuple(
        dataclasses.replace(n, path=n.path.replace("layers", "model.h"), code=n.code.replace("self.layers", "self.model.h"),
                            weights=tuple(w.replace("layers", "model.h") for w in n.weights))
        for n in a.nodes
    )  # fmt: skip
    weights = {name.replace("layers", "model.h"): weight for name, weight in a.weights.items()}
    b = dataclasses.replace(a, nodes=nodes, weights=weights)
    diff = compare(a, b)
    assert all(edit.before is not None and edit.after is not None for edit in diff.comparison.edits)
    assert {c.moved_from.replace("layers", "model.h") for c in diff.changes} == {c.path for c in diff.changes}
    assert "@@ layers.{1..5}.self_attn.q_proj ×5 → model.h.{1..5}.self_attn.q_proj ×5" in str(diff)


def test_statements_that_change_places_are_told_of():
    x, first, second = Statement("", "input", "x", ""), node("", "seed", (0,)), node("", "draw", (0,))
    diff = compare(Graph("A", (x, first, second)), Graph("A", (x, second, first)))
    assert len(diff.comparison.edits) == 1
    assert "# after" in str(diff)


def test_weights_of_another_shape_or_dtype_are_a_difference():
    from lora_fx.graphdiff.graphs import Weight

    nodes = (Statement("", "input", "x", ""), node("fc", "linear", (0,), weight="fc.weight"))
    a, b = (Graph("A", nodes, {"fc.weight": Weight((4, 4), dtype)}) for dtype in ("float32", "bfloat16"))
    (change,) = compare(a, b).changes
    assert change.removed == ("linear = linear(x, self.fc.weight, 0)  # weight float32 [4, 4]",)
    assert change.added == ("linear = linear(x, self.fc.weight, 0)  # weight bfloat16 [4, 4]",)
    assert change.bytes == (64, 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a graph"),
        ("[]", "not a graph"),
        ('{"kind": "lora_fx graph", "schema_version": 99}', "schema version 1"),
        ('{"kind": "lora_fx graph", "schema_version": 1, "name": "A", "parameters": 0, "bytes": 0, "weights": {}, '
         '"nodes": [{"path": "", "op": "relu", "name": "y", "code": "relu($0)", "inputs": [3]}]}', "not an earlier node"),
        ('{"kind": "lora_fx graph", "schema_version": 1, "name": "A", "parameters": 0, "bytes": 0, "weights": {}, '
         '"nodes": [{"path": "", "op": "relu", "name": "y", "code": "relu($0)"}]}', "refers to an input"),
        ('{"kind": "lora_fx graph", "schema_version": 1, "name": "A", "parameters": 0, "bytes": 0, "weights": {}, '
         '"nodes": [{"path": "", "op": "relu", "name": "y", "code": "", "weights": ["w"]}]}', "not described"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_graph_is_refused(text, said, tmp_path):
    (tmp_path / "graph.json").write_text(text)
    with pytest.raises(GraphFileError, match=said):
        Graph.load(tmp_path / "graph.json")


def test_a_file_whose_nodes_have_more_inputs_than_any_model_is_refused():
    nodes = (Statement("", "input", "x", ""), Statement("", "cat", "y", "cat($0)", (0,) * 200_000))
    with pytest.raises(GraphFileError, match="200,000 inputs together; at most 100,040"):
        Graph.from_json(Graph("A", nodes).to_json())
