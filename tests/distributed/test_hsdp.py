"""A model that four processes hold, two by two: pairs that have the same, or pairs that share layers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import twobytwo
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(4, twobytwo.by_four, tmp_path_factory.mktemp("four"), seconds=900)


def test_four_processes_train_as_one(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], rank["losses of one"], rtol=1e-5, atol=1e-6)


def test_four_processes_save_merge_and_remove_as_one(ranks):
    for rank in ranks:
        mine, expected = rank["files"]
        assert mine == expected
        for what in ("merged", "removed"):
            mine, expected = rank[what]
            assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []
            torch.testing.assert_close(*rank[f"output of {what}"], rtol=1e-5, atol=1e-5)
        assert rank["listed"][0] == rank["listed"][1]


def test_fully_shard_over_pairs_that_share_layers_trains_as_one_process_for_fifty_steps(ranks):
    for rank in ranks:
        mine, of_one = rank["two by two"]["losses"]
        assert len(mine) == 50
        torch.testing.assert_close(mine, of_one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*rank["two by two"]["output"], rtol=1e-5, atol=1e-5)
        assert rank["two by two"]["hits"] == {"embed": 50, "blocks.0": 50, "blocks.1": 50, "head": 0}


@pytest.mark.parametrize(
    ("way", "hits"),
    [
        ("fully_shard", 100),
        ("checkpointed", 200),
        ("split", 100),
    ],
)
def test_losses_of_fifty_steps_in_four_processes_are_those_of_one(ranks, way, hits):
    for rank in ranks:
        losses, found, of_one = rank["fifty"][way]
        assert len(losses) == 50
        torch.testing.assert_close(losses, of_one, rtol=1e-5, atol=1e-5)
        assert found == hits


PAIRS = pytest.mark.parametrize("way", ["grown", "later"])


def unlike(pair):
    mine, expected = pair
    assert mine.keys() == expected.keys()
    return [name for name in expected if not torch.equal(mine[name], expected[name])]


@PAIRS
def test_what_pairs_share_is_shown_and_saved_as_one(ranks, way):
    for rank in ranks:
        found = rank[way]
        assert found["files"][0] == found["files"][1]
        assert found["listed"][0] == found["listed"][1]
        torch.testing.assert_close(*found["losses"], rtol=1e-5, atol=1e-5)
        for output in ("output", "output of base", "output of merged", "output of removed"):
            torch.testing.assert_close(*found[output], rtol=1e-5, atol=1e-5)


@PAIRS
def test_what_pairs_share_is_given_back_bit_by_bit_and_shared_alike(ranks, way):
    for rank in ranks:
        found = rank[way]
        for what in ("merged", "removed", "unchanged"):
            assert unlike(found[what]) == []
        for placed in found["placed again"]:
            assert placed == {name: found["placed"][name] for name in placed}
        assert "_StridedShard" in found["placed"]["blocks.0.q.weight"]


def test_what_pairs_share_grows_in_place_as_one(ranks):
    for rank in ranks:
        found = rank["grown"]
        assert unlike(found["grown"]) == []
        assert unlike(found["state"]) == []
        assert found["kept"] == 8  # A and B of `b`, of two layers in two blocks
        assert "_StridedShard" in found["placed"]["head.lora_B.c.weight"]
        assert "parts of its weight are adapted (slices)" in found["slices"]


def test_what_pairs_share_already_is_adapted_alike(ranks):
    for rank in ranks:
        found = rank["later"]
        torch.testing.assert_close(*found["losses of first"], rtol=1e-5, atol=1e-5)
        for what in ("first", "loaded", "base"):
            assert unlike(found[what]) == []
        assert "parts of its weight are adapted (slices)" in found["slices"]
