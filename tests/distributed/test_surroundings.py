"""Adapted models in other places of torch.distributed: wrappers, schedules, offloading, checkpoints across meshes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import surroundings
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(2, surroundings.by_two, tmp_path_factory.mktemp("around"), seconds=900)


@pytest.mark.parametrize("options", surroundings.OPTIONS)
def test_each_way_of_data_parallel_trains_as_one_process_and_in_graphs(ranks, options):
    for rank in ranks:
        losses, misses = rank["parallel"][options]
        torch.testing.assert_close(losses, rank["parallel"]["of one"], rtol=1e-5, atol=1e-5)
        assert misses == 0


def test_a_model_that_was_wrapped_before_is_refused_by_name_and_adapted_once_it_is_taken_out(ranks):
    for rank in ranks:
        assert "a model inside of DistributedDataParallel cannot be adapted" in rank["prepared"]["asked"]
        torch.testing.assert_close(rank["prepared"]["losses"], rank["parallel"]["of one"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_offloaded_shards_train_and_are_saved_merged_and_removed_as_a_whole_model(ranks, order):
    for rank in ranks:
        found = rank["offloaded"][order]
        torch.testing.assert_close(found["losses"], rank["parallel"]["of one"], rtol=1e-5, atol=1e-5)
        assert found["files"][0] == found["files"][1]
        for what in ("merged", "removed"):
            mine, expected = found[what]
            assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []


@pytest.mark.parametrize("order", ["before", "after"])
def test_methods_that_fsdp_is_told_of_stay_so_on_whatever_comes_back(ranks, order):
    for rank in ranks:
        found = rank["registered"][order]
        assert found.pop("bound") == [True, True, True]
        for what, pair in found.items():
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("name", [*surroundings.SCHEDULES, "traced"])
def test_stages_of_each_schedule_train_as_one_process(ranks, name):
    found = [rank["schedules"][name] for rank in ranks]
    assert [stage["trained"] for stage in found] == [16, 16]
    losses = next(stage["losses"] for stage in found if stage["losses"])  # the last stage has them
    torch.testing.assert_close(losses, found[0]["of one"], rtol=1e-5, atol=1e-5)
    assert losses[-1] < losses[0]
    if name != "traced":  # a program that torch has exported knows no graphs of blocks
        assert all(stage["hits"] > 0 for stage in found)


def test_a_checkpoint_of_an_adapter_is_read_from_each_mesh_onto_each_other(tmp_path):
    for rank in in_processes(4, surroundings.from_mesh_to_mesh, tmp_path, seconds=600):
        expected = rank.pop("values")
        assert list(rank) == list(surroundings.PLACED)
        for onto, read in rank.items():
            for writer, found in zip(surroundings.PLACED, read, strict=True):
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in expected), (writer, onto)
