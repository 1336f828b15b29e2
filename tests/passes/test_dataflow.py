"""The dataflow of a graph: who reads whose value, how often, and what a value is made from."""

from __future__ import annotations

import torch
from torch import fx

from lora_fx.passes.dataflow import dataflow, made_from


def forward(x, y):
    doubled = x + x
    total = doubled * y
    return total - x


def names(nodes) -> list[str]:
    return [node.name for node in nodes]


def test_edges_lead_from_a_value_to_its_readers_in_the_order_of_the_graph():
    graph = fx.symbolic_trace(forward).graph
    flow = dataflow(graph)
    x, y, add, mul, sub, output = graph.nodes
    assert list(flow) == [x, y, add, mul, sub, output]
    assert names(flow[x]) == ["add", "sub"]
    assert names(flow.predecessors(mul)) == ["add", "y"]


def test_a_value_that_is_read_twice_by_one_reader_counts_twice():
    graph = fx.symbolic_trace(forward).graph
    x, _, add, _, sub, _ = graph.nodes
    flow = dataflow(graph)
    assert (flow.edges[x, add]["times"], flow.edges[x, sub]["times"]) == (2, 1)


def test_a_reader_after_a_write_in_place_reads_what_was_written():
    graph = fx.Graph()
    x = graph.placeholder("x")
    written = graph.call_function(torch.Tensor.add_, (x, 1))
    reader = graph.call_function(torch.mul, (x, 2))
    graph.output(reader)
    flow = dataflow(graph, lambda value, after: written if (value, after) == (x, reader) else value)
    assert (flow.edges[written, reader]["times"], flow.edges[x, reader]["times"]) == (1, 0)


def test_what_a_value_is_made_from_ends_where_it_is_told_to_stop():
    graph = fx.symbolic_trace(forward).graph
    x, y, add, mul, sub, _ = graph.nodes
    flow = dataflow(graph)
    assert made_from(flow, sub, lambda node: node.op == "placeholder") == {sub, mul, add}
    assert made_from(flow, sub, lambda node: node is add) == {sub, mul, x, y}
