"""A model that four processes hold, sharded over pairs: each pair has the same, and the first process writes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import sharded
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(4, sharded.replicated, tmp_path_factory.mktemp("four"))


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
