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
    return in_processes(4, twobytwo.by_four, tmp_path_factory.mktemp("four"))


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
        # graphs step aside for the hooks of layers that are split, and their tensors
        assert rank["two by two"]["hits"] == {"embed": 50, "blocks.0": 0, "blocks.1": 50, "head": 0}


def test_what_pairs_share_is_shown_and_saved_as_one(ranks):
    for rank in ranks:
        found = rank["two by two"]
        assert found["files"][0] == found["files"][1]
        assert found["norm"][0] == pytest.approx(found["norm"][1], rel=1e-6)
        for output in ("output", "output of base"):
            torch.testing.assert_close(*found[output], rtol=1e-5, atol=1e-5)


def test_a_model_that_pairs_share_is_not_given_back_nor_grown(ranks):
    for rank in ranks:
        found = rank["two by two"]
        for text in found["refused"].values():
            assert text.startswith("RefusedError: ")
            assert "parameters were DTensors before (tensor parallel)" in text
        before, after = found["unchanged"]
        assert all(torch.equal(before[name], after[name]) for name in before)
