"""Blocks run as graphs while FSDP2 shards them: those from before, and those of their first calls where that asks for others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import shardedgraphs
from tests.support.processes import in_processes
from tests.support.sharded import assert_folded_as_whole_ones

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("transformers")
    return in_processes(2, shardedgraphs.trained, tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize(
    ("kind", "hits", "misses"),
    [
        ("plain", 8, {}),
        ("bfloat16 policy", 7, {"dtype of x": 1}),
        ("autocast", 7, {"autocast on cpu": 1}),
        ("wrapped before", 16, {}),
        ("wrapped after", 16, {}),
        ("llama checkpointed", 16, {}),
    ],
)
def test_two_blocks_in_four_steps_are_graphs_and_train_as_without(ranks, kind, hits, misses):
    for rank in ranks:
        graphs, modules = rank[kind]["auto"], rank[kind]["modules"]
        assert (graphs["hits"], graphs["misses"]) == (hits, misses)
        assert modules["hits"] == 0
        tolerance = 1e-3 if kind in ("bfloat16 policy", "autocast") else 1e-6  # bfloat16 rounds at 2⁻⁹
        torch.testing.assert_close(graphs["losses"], modules["losses"], rtol=tolerance, atol=tolerance)
    assert ranks[0][kind]["auto"]["losses"] == ranks[1][kind]["auto"]["losses"]


@pytest.mark.parametrize(
    ("way", "hits"),
    [
        ("data parallel", 100),
        ("fully_shard", 100),
        ("checkpointed", 200),
        ("bfloat16 policy without graphs", 0),
        ("bfloat16 policy", 99),  # but the first call, in another dtype: blocks of one kind share what is captured
    ],
)
def test_losses_of_fifty_steps_on_halves_of_each_batch_are_those_of_one_process(ranks, way, hits):
    for rank in ranks:
        losses, found, of_one = rank["fifty"][way]
        assert len(losses) == 50
        torch.testing.assert_close(losses, of_one, rtol=1e-5, atol=1e-5)
        assert found == hits


@pytest.mark.parametrize(
    ("kind", "codes"),
    [
        ("compressed-tensors W4A16, asymmetric", {torch.int32, torch.int64}),
        ("compressed-tensors FP8", set()),  # they are floating point
        ("compressed-tensors W8A8", {torch.int8}),
        ("hqq 4 bits", {torch.uint8}),
        ("hqq 3 bits", {torch.int32}),
    ],
)
def test_codes_that_are_sharded_train_and_are_saved_as_whole_ones_and_what_else_there_is_refused_by_name(
    ranks, kind, codes
):
    if "coded" not in ranks[0]:
        pytest.skip("bitsandbytes, compressed-tensors and hqq are not installed")
    for rank in ranks:
        found = rank["coded"][kind]
        assert set(found["codes"]) == codes
        torch.testing.assert_close(*found["losses"], rtol=1e-5, atol=1e-5)
        assert found["losses"][0][-1] < found["losses"][0][0]
        assert found["hits"] == [5, 5]
        torch.testing.assert_close(*found["trained"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*found["output"], rtol=1e-5, atol=1e-5)
        assert torch.equal(*found["removed"])
        assert found["files"][0] == found["files"][1]
        assert_folded_as_whole_ones(found)
        for what in ("add", "apply"):
            assert "adapters do not join shards of a quantised base" in found["refused"][what]


def test_eight_bits_of_bitsandbytes_say_that_they_do_not_run_sharded(ranks):
    if "coded" not in ranks[0]:
        pytest.skip("bitsandbytes, compressed-tensors and hqq are not installed")
    for rank in ranks:
        assert rank["coded"]["int8"].startswith("RefusedError: a quantised layer does not run as it is held")
        assert "Linear8bitLt  fully_shard has sharded its codes" in rank["coded"]["int8"]


def test_a_block_with_sharded_modules_inside_runs_without_a_graph(ranks):
    for rank in ranks:
        graphs, modules = rank["sharded inside"]["auto"], rank["sharded inside"]["modules"]
        assert graphs["hits"] == 0
        torch.testing.assert_close(graphs["losses"], modules["losses"], rtol=1e-6, atol=1e-6)


def test_blocks_in_wrappers_of_checkpointing_are_merged_as_whole_ones(ranks):
    for rank in ranks:
        mine, whole = rank["wrapped after"]["auto"]["merged"]
        assert [name for name in whole if not torch.equal(mine[name], whole[name])] == []


def test_trainers_save_from_every_process_or_from_the_main_one_with_gathered_values(ranks):
    for rank in ranks:
        saved = rank["llama checkpointed"]["auto"]
        assert sorted(saved["every"]) == ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"]
        assert saved["every"] == saved["main"]
    assert "the state_dict holds parts of tensors" in ranks[0]["llama checkpointed"]["auto"]["parts"]


def test_what_is_trained_in_another_dtype_has_a_group_of_its_own(ranks):
    for rank in ranks:
        for backend in ("auto", "modules"):
            result = rank["trained in bfloat16"][backend]
            assert "FSDP expects uniform original parameter dtype" in result["together"]
            torch.testing.assert_close(result["losses"], result["losses of one"], rtol=2e-2, atol=2e-2)
            assert result["difference"] < 0.1
