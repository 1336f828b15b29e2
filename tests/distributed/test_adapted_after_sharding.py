"""A model that FSDP2 has sharded over two processes is adapted as one that is adapted first."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import aftershards
from tests.support.processes import in_processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


KINDS = [*aftershards.FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in aftershards.MANY)]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return in_processes(2, aftershards.few_adapted_later, tmp_path_factory.mktemp("few"))


@pytest.fixture
def ranks(request, kind):
    return request.getfixturevalue("few" if kind in aftershards.FEW else "many")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return in_processes(2, aftershards.many_adapted_later, tmp_path_factory.mktemp("many"))


def _unlike(pair):
    mine, expected = pair
    assert mine.keys() == expected.keys()
    return [name for name in expected if not torch.equal(mine[name], expected[name])]


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_are_those_of_the_first_process_and_sharded_as_their_base(ranks, kind):
    for rank in ranks:
        assert _unlike(rank[kind]["first"]) == []
        assert set(rank[kind]["placements"]) == {"(Shard(dim=0),)"}
        assert rank[kind]["plan"][0] == rank[kind]["plan"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_two_halves_of_a_batch_are_those_of_one_process(ranks, kind):
    for rank in ranks:
        mine, expected = rank[kind]["losses"]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        assert rank[kind]["hits"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_merged_removed_and_loaded_is_that_of_a_whole_model(ranks, kind):
    for rank in ranks:
        saved, expected = rank[kind]["files"]
        assert saved == expected
        for what in ("merged", "removed", "loaded", "model"):
            assert _unlike(rank[kind][what]) == []
        for what in ("merged", "removed", "loaded", "modules", "model"):
            torch.testing.assert_close(*rank[kind][f"output of {what}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("outside", "head.lora_A.default.weight  is in no module of fully_shard"),
        ("dtypes", "(root)  embed.lora_A.default.weight, embed.lora_B.default.weight float32; norm.weight, norm.bias bfloat16"),
        ("rows", "are not taken from shards"),
        ("data", "data shows it nothing"),
        ("ranks", "its ranks are not allocated"),
    ],
)  # fmt: skip
def test_what_would_be_in_no_group_is_refused_by_name_on_every_process(few, what, told):
    for rank in few:
        assert rank["refused"][what].startswith("RefusedError: ")
        assert told in rank["refused"][what]


def test_adapters_are_added_combined_and_swapped_in_place_as_on_a_whole_model(few):
    for rank in few:
        grown = rank["grown"]
        for what in ("unchanged", "grown", "state", "merged", "removed"):
            assert _unlike(grown[what]) == []
        saved, expected = grown["files"]
        assert saved == expected
        torch.testing.assert_close(*grown["losses"], rtol=1e-5, atol=1e-5)
        for mine, whole in grown["after"]:
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
        assert grown["hits"] > 0


def test_what_optimizers_hold_and_groups_were_told_outlasts_an_added_adapter(few):
    for rank in few:
        assert rank["grown"]["kept"] == (True, True)
        assert rank["grown"]["hooks"] == 0
        in_groups, there = rank["grown"]["held"]
        assert in_groups == there


def test_an_adapter_that_cannot_be_added_leaves_the_sharded_model_as_it_was(few):
    for rank in few:
        assert rank["grown"]["clashing"].startswith("RefusedError: an adapter cannot stand beside a weight")
