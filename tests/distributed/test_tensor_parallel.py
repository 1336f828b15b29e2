"""Adapters go with the weights that `parallelize_module` shards over two processes, or with the stages of a pipeline."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import parallel
from tests.support.parallel import BOTH, COLUMNS, ROWS
from tests.support.processes import in_processes
from tests.support.sharded import assert_folded_as_whole_ones

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]
KINDS = (*parallel.KINDS, "several", "after", "grown")
OUTPUTS = ("output", "output of base", "output of copy", "output of merged", "output of removed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(2, parallel.treated, tmp_path_factory.mktemp("parallel"), fresh=True)


def test_losses_are_those_of_one_process(ranks):
    for rank in ranks:
        for kind in (*parallel.KINDS, "after", "grown"):
            torch.testing.assert_close(rank[kind]["losses"], rank[kind]["losses of one"], rtol=1e-5, atol=1e-6)


def test_factors_are_sharded_as_their_weights_imply(ranks):
    placed = ranks[0]["plain"]["placed"]
    for name, weight, A, B in (
        ("blocks.0.up", COLUMNS, BOTH, COLUMNS),
        ("blocks.0.down", ROWS, ROWS, BOTH),
        ("head", COLUMNS, BOTH, COLUMNS),
        ("embed", ROWS, BOTH, COLUMNS),  # its weight is stored as [in, out]
    ):
        assert placed[f"{name}.weight"] == weight
        assert placed[f"{name}.lora_A.default.weight"] == A
        assert placed[f"{name}.lora_B.default.weight"] == B
    lengths = ranks[0]["dora"]["placed"]
    assert lengths["blocks.0.q.lora_magnitude_vector.default.weight"] == COLUMNS
    assert lengths["blocks.0.v.lora_magnitude_vector.default.weight"] == BOTH


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_whole_model_and_of_its_base(ranks, kind):
    for rank in ranks:
        for output in OUTPUTS:
            torch.testing.assert_close(*rank[kind][output], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_byte_for_byte_those_of_the_whole_model_and_there_on_every_process(ranks, kind):
    for rank in ranks:
        mine, those_of_one = rank[kind]["files"]
        assert list(mine) == list(those_of_one)
        assert mine == those_of_one


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_removed_models_have_the_bits_of_whole_ones_and_are_parallel(ranks, kind):
    for rank in ranks:
        for what in ("merged", "removed"):
            mine, expected = rank[kind][what]
            assert mine.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []
        placed = rank[kind]["placed"]
        assert rank[kind]["placed merged"] == {name: placed[name] for name in placed if "lora_" not in name}
        before, after = rank[kind]["unchanged"]
        assert all(map(torch.equal, before.values(), after.values()))


def test_blocks_with_split_layers_run_as_graphs(ranks):
    for rank in ranks:
        hits = rank["plain"]["hits"]
        assert hits["blocks.0"] == hits["blocks.1"] == 50 + 1  # steps, and an output; `disabled` runs modules


def test_gradients_of_whole_factors_are_sums_over_the_processes(ranks):
    for rank in ranks:
        assert len(rank["others"]["grads"]) == 16
        for mine, expected in rank["others"]["grads"]:
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


def test_compiled_code_and_autocast_compute_the_same(ranks):
    for rank in ranks:
        torch.testing.assert_close(*rank["others"]["compiled"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*rank["others"]["cast"], rtol=2e-2, atol=2e-2)


def test_dora_of_an_embedding_whose_rows_are_sharded_is_that_of_the_whole_one(ranks):
    for rank in ranks:
        torch.testing.assert_close(*rank["others"]["by rows"], rtol=1e-5, atol=1e-5)


def test_frozen_weights_stay_frozen_where_torch_forgets_it(ranks):
    assert ranks[0]["others"]["flags"] == [False]


def test_whole_factors_stay_the_same_on_all_processes_whatever_each_drops(ranks):
    one, other = (rank["others"]["dropped"] for rank in ranks)
    assert len(one) == 8
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("slices", "parts of its weight are adapted (slices)"),
        ("reads", "code reads its weight, and multiplies by it itself"),
        ("invocation", "it acts from an invocation on"),
        ("rows", "has values beside the model's own"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name_before_it_is_changed(ranks, what, reason):
    for rank in ranks:
        text, shards = rank["refused"][what]
        assert text.startswith("RefusedError: ")
        assert reason in text
        assert shards == []


def test_rows_of_a_batch_are_refused_by_name(ranks):
    for rank in ranks:
        assert rank["several"]["rows"].startswith("RefusedError: adapters cannot be chosen row by row")


def test_adapters_are_added_combined_and_swapped_in_place_as_on_a_whole_model(ranks):
    for rank in ranks:
        grown = rank["grown"]
        for what in ("grown", "state"):
            mine, expected = grown[what]
            assert mine.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []
        assert grown["kept"] == 8  # A and B of `b`, of two layers in two blocks; what was dropped is gone
        assert grown["placed"]["head.lora_A.c.weight"] == BOTH
        assert grown["placed"]["head.lora_B.c.weight"] == COLUMNS
        assert "parts of its weight are adapted (slices)" in grown["slices"]


def test_halves_of_an_adapted_decoder_train_as_stages_of_a_pipeline_and_run_as_graphs(ranks):
    for rank in ranks:
        mine = rank["pipelined"]
        torch.testing.assert_close(mine["losses"], mine["losses of one"], rtol=1e-5, atol=1e-6)
        assert mine["hits"] >= 6  # two parts of a batch in each of three steps
        assert mine["files"] == ["adapter_config.json", "adapter_model.safetensors"]
        values, expected = mine["values"]
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert sum(rank["pipelined"]["own"] for rank in ranks) == ranks[0]["pipelined"]["all"]


def test_a_model_that_is_parallel_already_is_adapted_alike_on_all_processes(ranks):
    one, other = (rank["after"]["first"] for rank in ranks)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert one["blocks.0.q.lora_A.default.weight"].any()
    placed = ranks[0]["after"]["placed"]
    assert placed["blocks.0.down.lora_A.default.weight"] == ROWS
    assert placed["head.lora_B.default.weight"] == COLUMNS
    for rank in ranks:
        before, after = rank["after"]["base"]
        assert all(torch.equal(before[name], after[name]) for name in after)


def test_an_adapter_is_loaded_into_a_model_that_is_parallel_already(ranks):
    for rank in ranks:
        mine, expected = rank["after"]["loaded"]
        assert mine.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []
        torch.testing.assert_close(*rank["after"]["output of loaded"], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_placed_beside_shards_is_refused_by_name(ranks):
    for rank in ranks:
        assert "parts of its weight are adapted (slices)" in rank["after"]["slices"]


def test_codes_that_fsdp_shards_are_trained_and_saved_and_what_else_there_is_refused_by_name(ranks):
    pytest.importorskip("bitsandbytes")
    for rank in ranks:
        mine = rank["packed"]
        torch.testing.assert_close(*mine["losses"], rtol=1e-5, atol=1e-6)
        found, expected = mine["files"]
        assert found.keys() == expected.keys()
        torch.testing.assert_close(*mine["removed"], rtol=1e-5, atol=1e-6)
        assert_folded_as_whole_ones(mine)
        assert "adapters do not join shards of a quantised base" in mine["apply"]
        assert "its weight is quantised" in mine["parallel"]
