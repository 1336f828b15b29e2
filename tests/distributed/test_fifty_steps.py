"""Fifty steps of four processes in the ways that two take everywhere: those of one process with the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import fiftysteps
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
    pytest.mark.fuzz,  # two processes run the same in CI
]


def by_four(folder: Path) -> dict[str, Any]:
    return fiftysteps.fifty()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(4, by_four, tmp_path_factory.mktemp("fifty"), seconds=900)


@pytest.mark.parametrize(
    ("way", "hits"),
    [
        ("data parallel", 100),
        ("fully_shard", 100),
        ("checkpointed", 200),
        ("bfloat16 policy without graphs", 0),
        ("bfloat16 policy", 99),  # but the first call, in another dtype
    ],
)
def test_losses_of_fifty_steps_on_quarters_of_each_batch_are_those_of_one_process(ranks, way, hits):
    for rank in ranks:
        losses, found, of_one = rank[way]
        assert len(losses) == 50
        torch.testing.assert_close(losses, of_one, rtol=1e-5, atol=1e-5)
        assert found == hits
