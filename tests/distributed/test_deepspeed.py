"""DeepSpeed's ZeRO, where it is installed: it trains as one process, and ZeRO-3 is refused or gathered."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.distributed as dist

from tests.support import deepspeeds
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(2, deepspeeds.by_each_stage, tmp_path_factory.mktemp("zero"), seconds=900)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_on_halves_of_each_batch_are_those_of_one_process(ranks, stage):
    for rank in ranks:
        torch.testing.assert_close(rank[stage]["losses"], rank[stage]["of one"], rtol=1e-5, atol=1e-5)
        assert rank[stage]["hits"] == (0 if stage == 3 else 2 * deepspeeds.STEPS)  # ZeRO-3 hooks the layers inside


def test_what_stages_leave_whole_is_saved_and_merged_and_what_they_part_is_refused_by_name(ranks):
    for rank in ranks:
        assert rank[1]["refused"] == rank[2]["refused"] == {"save": "", "merge": ""}
        assert "the adapter is partitioned, and this process does not hold it" in rank[3]["refused"]["save"]
        assert "ZeRO-3 has partitioned its weight" in rank[3]["refused"]["merge"]


def test_what_zero_3_gathers_is_saved(ranks):
    for rank in ranks:
        found, expected = rank[3]["gathered"]
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
