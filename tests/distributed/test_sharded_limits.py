"""What cannot be done to a sharded model is refused on every process alike, and nothing has changed then."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import lora_fx
from tests.support import sharded
from tests.support.processes import in_processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return in_processes(2, sharded.refused, tmp_path_factory.mktemp("refused"))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    return in_processes(2, sharded.started_empty, tmp_path_factory.mktemp("started"))


@pytest.mark.parametrize("what", ["export", "requantize", "remerge", "extract"])
def test_what_shards_do_not_allow_is_refused_by_name(refused, what):
    for rank in refused:
        assert rank["texts"][what].startswith("RefusedError: ")
        assert ("a DTensor" if what == "requantize" else "fully_shard was called on it") in rank["texts"][what]


def test_an_error_of_the_process_that_writes_is_raised_on_every_process(refused):
    assert refused[0]["texts"]["save in a file"].startswith("AdapterFileError: ")
    assert refused[0]["texts"]["save in a file"] == refused[1]["texts"]["save in a file"]


def test_a_value_that_one_process_alone_holds_keeps_all_from_merging(refused):
    for rank in refused:
        assert rank["texts"]["merge"].startswith("MergeError: merging would spoil the model")
        assert "blocks.1.down" in rank["texts"]["merge"]


def test_refusals_have_changed_nothing(refused):
    for rank in refused:
        before, after = rank["before"], rank["after"]
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed == ["blocks.1.down.weight"]  # by the test itself
        expected = sharded.base().state_dict()
        assert all(torch.equal(rank["plain"][name], expected[name]) for name in expected)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_rows_of_embeddings_are_not_gathered(tmp_path):
    rules = {"version": 1, "rules": [sharded.rule("blocks.*.q")], "tokens": [{"name": "embed", "ids": [1, 5]}]}
    tuned = sharded.sharded(sharded.adapted(rules))
    for work in (
        lambda: lora_fx.save(tuned, tmp_path / "adapter"),
        lambda: lora_fx.merge(tuned),
        lambda: lora_fx.deltas(tuned),
    ):
        with pytest.raises(lora_fx.RefusedError, match="are not gathered from shards") as caught:
            work()
        assert caught.value.refusals == (("embed.weight", "of 'default'"),)
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_starts_without_values_trains_as_one_that_has_them(started):
    for rank in started:
        torch.testing.assert_close(rank["losses"], rank["losses of one"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["output"], rank["base output"], rtol=1e-5, atol=1e-5)
        mine, expected = rank["merged"]
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
        assert all(torch.equal(rank["removed"][name], rank["base"][name]) for name in rank["base"])


def test_factors_that_start_without_values_get_those_of_the_rule_the_same_everywhere(started):
    one, other = (rank["first"] for rank in started)
    for name in one:
        assert torch.equal(one[name], other[name])
        if "lora_B" in name and "embed" not in name:
            assert not one[name].any()
    first = one["blocks.0.q.lora_A.default.weight"]
    torch.testing.assert_close(first @ first.T, torch.eye(3), atol=1e-6, rtol=1e-6)
    assert not one["embed.lora_A.default.weight"].any()
    assert one["embed.lora_B.default.weight"].std() > 0.5
    assert one["blocks.0.up.lora_A.default.weight"].any()
