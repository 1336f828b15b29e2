"""A Llama that transformers loads by its `tp_plan` over two processes, or accelerate shards, is adapted as a whole one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import tpplans
from tests.support.parallel import BOTH, COLUMNS, ROWS
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("transformers.distributed")
    pytest.importorskip("accelerate")
    return in_processes(2, tpplans.planned, tmp_path_factory.mktemp("planned"))


def test_losses_of_fifty_steps_are_those_of_one_process(ranks):
    for rank in ranks:
        torch.testing.assert_close(*rank["losses"], rtol=1e-5, atol=1e-5)
        assert rank["losses"][0][-1] < rank["losses"][0][0]
        assert rank["hits"] == [(50, {}), (50, {})]


def test_first_values_are_alike_and_factors_are_placed_as_their_weights_imply(ranks):
    one, other = (rank["first"] for rank in ranks)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    placed = ranks[0]["placed"]
    for name, A, B in (("self_attn.q_proj", BOTH, COLUMNS), ("mlp.down_proj", ROWS, BOTH)):
        assert placed[f"model.layers.0.{name}.lora_A.default.weight"] == A
        assert placed[f"model.layers.0.{name}.lora_B.default.weight"] == B
    assert ranks[0]["plan"][0] == ranks[0]["plan"][1]


def test_outputs_with_and_without_gradients_are_those_of_the_whole_model(ranks):
    for rank in ranks:
        for what, pair in rank["outputs"].items():
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}")
        assert torch.equal(*rank["generated"])


def test_what_is_saved_merged_removed_and_loaded_is_that_of_the_whole_model(ranks):
    for rank in ranks:
        saved, expected = rank["files"]
        assert saved == expected
        for what in ("merged", "removed", "loaded", "model"):
            mine, whole = rank[what]
            assert mine.keys() == whole.keys()
            assert [name for name in whole if not torch.equal(mine[name], whole[name])] == []


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("dora", "DoRA's lengths are those of whole ones"),
        ("bias", "transformers adds its bias by itself"),
        ("train", "these values cannot be trained under transformers' tensor parallelism"),
        ("slices", "parts of its weight are adapted (slices)"),
        ("rows", "embed_tokens"),
    ],
)
def test_what_would_be_wrong_there_is_refused_by_name(ranks, what, told):
    for rank in ranks:
        assert rank["refused"][what].startswith("RefusedError: ")
        assert told in rank["refused"][what]


@pytest.mark.parametrize(
    ("order", "hits"),
    [
        ("before", 20),
        ("before, loaded by one", 20),
        ("before, checkpointed", 40),
        ("before, checkpointed, with a cache", 20),  # what is made again meets a cache that is filled, and is no hit
        ("after", 15),  # blocks are captured at their first calls
    ],
)
def test_a_model_that_accelerate_shards_trains_and_is_saved_as_a_whole_one(ranks, order, hits):
    for rank in ranks:
        found = rank["accelerate"][order]
        torch.testing.assert_close(*found["losses"], rtol=1e-5, atol=1e-5)
        assert found["hits"] >= hits
        assert found["sharded"] == "FSDPModule"
        assert found["files"][0] == found["files"][1]
        mine, whole = found["merged"]
        assert [name for name in whole if not torch.equal(mine[name], whole[name])] == []
