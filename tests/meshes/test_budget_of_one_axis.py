"""What is counted for a mesh of one axis, and what DistributedDataParallel takes, beside what two processes allocate."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import lora_fx
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.support import metered

    return in_processes(2, metered.by_two, tmp_path_factory.mktemp("metered"))


def counted(mesh):
    from tests.support.metered import RULES, inputs, llama

    budget = lora_fx.budget(llama(), RULES, inputs(), mesh=mesh)
    return budget, {"": budget.plain, " checkpointed": budget.checkpointed}


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2"])
def test_a_device_of_one_axis_allocates_what_is_counted(ranks, mesh):
    budget, steps = counted(mesh)
    for real, step in ((found[mesh + more], step) for found in ranks for more, step in steps.items()):
        for what in ("weights", "adapters", "optimizer", "gradients"):
            assert getattr(budget, what) == real[what]
        assert step.kept == real["kept"]
        assert step.flops == pytest.approx(real["flops"], rel=0.01)
        all_of_it = budget.total(step) - budget.optimizer
        assert all_of_it == pytest.approx(real["weights"] + real["adapters"] + real["peak"], rel=0.1)


def test_data_parallel_takes_what_one_device_takes_with_gradients_there_all_the_time(ranks):
    budget, steps = counted("dp=1")
    for real, step in ((found[f"ddp{more}"], step) for found in ranks for more, step in steps.items()):
        for what in ("weights", "adapters", "optimizer", "gradients"):
            assert getattr(budget, what) == real[what]
        assert step.kept + budget.gradients == real["kept"]
        assert step.peak + budget.gradients == real["peak"]
        assert step.flops == real["flops"]
