"""Blocks whose layers two processes share run as graphs: what they compute, keep and send, and when they do not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import splitgraphs
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("transformers")
    return in_processes(2, splitgraphs.split, tmp_path_factory.mktemp("split"), seconds=900)


def near(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("way", "hits"), [("llama", 50), ("checkpointed", 100), ("without graphs", None)])
def test_losses_of_fifty_steps_are_those_of_one_process_and_every_call_is_a_hit(ranks, way, hits):
    for rank in ranks:
        near(*rank[way]["losses"])
        assert rank[way]["hits"] == ([hits, hits] if hits else [])
        assert rank[way]["misses"] == ([{}, {}] if hits else [])


def test_a_graph_keeps_and_sends_less_than_its_modules(ranks):
    for rank in ranks:
        graphs, modules = rank["llama"], rank["without graphs"]
        assert graphs["kept"] < 0.7 * modules["kept"]
        assert graphs["sums"] < modules["sums"]
        assert "stack, recompute" in graphs["report"]


def test_a_model_is_copied_with_its_gradients_bit_by_bit(ranks):
    for rank in ranks:
        assert all(torch.equal(one, other) for one, other in rank["llama"]["copied"])


def test_generation_with_a_cache_gives_the_tokens_of_the_whole_model(ranks):
    for rank in ranks:
        for way in ("llama", "without graphs"):
            assert torch.equal(*rank[way]["generated"])


def test_outputs_are_those_of_the_whole_model_whatever_is_used_and_every_call_is_a_hit(ranks):
    for rank in ranks:
        for what, pair in rank["ways"]["outputs"].items():
            near(*pair, 2e-2 if what == "autocast" else 1e-5)
        hits, misses = rank["ways"]["counted"]
        assert hits == [6, 6]
        assert misses == [{}, {}]


def test_a_hook_on_a_split_layer_is_called_and_the_graph_comes_back_without_it(ranks):
    for rank in ranks:
        for pair in rank["hooked"]["outputs"]:
            near(*pair)
        assert rank["hooked"]["hits"] == ([1, 2], [2, 3])
        assert "there is a hook on up, which processes share" in rank["hooked"]["report"]


def test_no_process_runs_a_graph_that_another_one_has_not(ranks):
    for rank, why in zip(
        ranks, ("another process that shares its layers cannot do so", "here something is"), strict=True
    ):
        for pair in rank["parted"]["outputs"]:
            near(*pair)
        hits, misses = rank["parted"]["counted"]
        assert hits == [0, 0]
        assert [why in reason for reasons in misses for reason in reasons] == [True, True]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", splitgraphs.CHANGES)
def test_what_one_process_alone_does_to_a_block_lets_all_run_its_forward(ranks, what, when):
    for number, rank in enumerate(ranks):
        pairs, (hits, misses) = rank["one of them"][what][when]
        for pair in pairs:
            near(*pair)
        assert hits[0] == (0 if when == "before" else 1)
        assert sum(misses[0].values()) == 2
        if number == 1:
            assert list(misses[0]) == ["another process that shares its layers cannot do so"]


@pytest.mark.parametrize("what", splitgraphs.REPLACED)
def test_what_stands_for_a_block_is_kept_until_something_in_it_is_replaced(ranks, what):
    for rank in ranks:
        found = rank["replaced"][what]
        assert len(found["pairs"]) > 8
        for pair in found["pairs"]:
            near(*pair)
        assert found["kept"] == (True, what in ("nothing", "values", "trained bias"))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("gathered", "q is split otherwise than a linear by ColwiseParallel() or RowwiseParallel()"),
        ("dora", "q is split over processes, and DoRA's lengths are those of whole rows"),
        ("bias", "q is split over processes, and what it holds is trained"),
        ("asked", "the forward asks about up.bias, of which processes have parts"),
    ],
)
def test_what_runs_without_a_graph_says_why(ranks, what, reason):
    for rank in ranks:
        output, expected, hits, reasons = rank["otherwise"][what]
        near(output, expected)
        assert hits == 0
        assert reasons == [reason]


@pytest.mark.parametrize("what", splitgraphs.HINDERED)
def test_a_block_has_its_graph_again_when_what_hindered_it_is_gone(ranks, what):
    for rank in ranks:
        found = rank["for a while"][what]
        for pair in found["pairs"]:
            near(*pair)
        before, during, after = found["hits"]
        assert before == during == 5
        assert after > during


def test_weights_that_a_block_had_are_not_kept_for_another_mode(ranks):
    assert all(rank["let go"] for rank in ranks)
