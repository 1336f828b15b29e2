"""What FSDP2 has sharded over two processes is saved, shown, merged and removed as if one process held it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint

import lora_fx
from tests.support import sharded
from tests.support.processes import in_processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
KINDS = [*sharded.RULES, "several"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    return in_processes(2, sharded.treated, folder, fresh=True)


@pytest.mark.parametrize("kind", sharded.RULES)
def test_losses_are_those_of_one_process(ranks, kind):
    for rank in ranks:
        torch.testing.assert_close(rank[kind]["losses"], rank[kind]["losses of one"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_byte_for_byte_those_of_the_whole_model_and_there_on_every_process(ranks, kind):
    for rank in ranks:
        mine, those_of_one = rank[kind]["files"]
        assert list(mine) == list(those_of_one)
        assert mine == those_of_one


@pytest.mark.parametrize("kind", sharded.RULES)
def test_outputs_are_those_of_the_whole_model_and_of_its_base(ranks, kind):
    for rank in ranks:
        torch.testing.assert_close(*rank[kind]["output"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*rank[kind]["output of base"], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_is_read_by_one(ranks, folder):
    for kind, rules in sharded.RULES.items():
        tuned = sharded.adapted(rules)
        state = lora_fx.adapter_state(tuned)
        checkpoint.load(state, checkpoint_id=folder / kind / "checkpoint")
        lora_fx.load_adapter_state(tuned, state)
        expected = ranks[0][kind]["before"]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tuned.state_dict().items())


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_read_by_four_adapted_before_or_after(ranks, folder):
    (folder / "four").mkdir()
    expected = ranks[0]["plain"]["before"]
    for rank in in_processes(4, sharded.read_by_more, folder / "four"):
        for read in rank.values():
            assert read.keys() == expected.keys()
            assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["merged", "removed"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_removed_models_have_the_bits_of_whole_ones(ranks, kind, what):
    for rank in ranks:
        mine, expected = rank[kind][what]
        assert mine.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_removed_models_are_sharded_and_run(ranks, kind):
    for rank in ranks:
        assert rank[kind]["classes"] == ("Tokens", "Block")
        for what in ("output of merged", "output of removed"):
            torch.testing.assert_close(*rank[kind][what], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_keeps_nothing_of_merged_weights_but_its_part(ranks, kind):
    for rank in ranks:
        assert rank[kind]["own memory"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_model_trains_what_the_base_trained(ranks, kind):
    for rank in ranks:
        mine, expected = rank[kind]["flags"]
        assert mine == expected


@pytest.mark.parametrize("kind", sharded.RULES)
def test_the_sharded_model_stays_unchanged(ranks, kind):
    for rank in ranks:
        assert rank[kind]["before"].keys() == rank[kind]["after"].keys()
        assert all(map(torch.equal, rank[kind]["before"].values(), rank[kind]["after"].values()))


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_and_audit_are_those_of_the_whole_model(ranks, kind):
    for rank in ranks:
        mine, expected = (json.loads(text)["sites"] for text in rank[kind]["deltas"])
        for one, other in zip(mine, expected, strict=True):
            assert one.pop("weight_norm") == pytest.approx(other.pop("weight_norm"), rel=1e-6)
            assert one.pop("ratio") == pytest.approx(other.pop("ratio"), rel=1e-6)
            assert one == other
        mine, expected = (json.loads(text) for text in rank[kind]["audit"])
        assert mine.keys() == expected.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_reports_count_the_whole_model(ranks, kind):
    for rank in ranks:
        assert rank[kind]["listed"][0] == rank[kind]["listed"][1]
        mine, expected = (text.splitlines()[-1] for text in rank[kind]["report"])
        assert mine == expected
        assert mine.startswith("Trainable: ")


def test_several_adapters_are_chosen_merged_dropped_and_renamed(ranks):
    for rank in ranks:
        mine, expected = rank["several"]["merged b"]
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
        torch.testing.assert_close(*rank["several"]["output of c"])
        torch.testing.assert_close(*rank["several"]["output of base"])
        assert rank["several"]["files of c"] == ["adapter_config.json", "adapter_model.safetensors"]
