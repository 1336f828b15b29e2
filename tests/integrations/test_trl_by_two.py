"""TRL's trainers in two processes: both have the same factors, and log what they log with PEFT's; no second base."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import in_processes

pytest.importorskip("trl")
pytest.importorskip("peft")

from tests.support import trainersbytwo

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of TRL itself
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(2, trainersbytwo.logs_of_all, tmp_path_factory.mktemp("trl"), seconds=900)


@pytest.mark.parametrize(("kind", "reference"), [("sft", "NoneType"), ("dpo", "Reference"), ("grpo", "Reference")])
def test_two_processes_log_what_they_log_with_peft_and_have_the_same_factors(ranks, kind, reference):
    for rank in ranks:
        found = rank[kind]
        ours, theirs = found["logs"]
        assert len(ours) == 5
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert {**one, "step_time": 0} == pytest.approx({**other, "step_time": 0}, rel=1e-5, abs=1e-5)
        assert (found["wrapped"], found["reference"]) == ("DistributedDataParallel", reference)
    first, second = (rank[kind]["factors"] for rank in ranks)
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))
