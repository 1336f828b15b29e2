"""What is counted for a mesh, beside what four processes really allocate."""

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

    return in_processes(4, metered.by_four, tmp_path_factory.mktemp("metered"))


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "tp=2,pp=2"])
def test_what_is_counted_is_what_processes_allocate(ranks, mesh):
    from tests.support.metered import PARTS, RULES, inputs, llama

    budget = lora_fx.budget(llama(), RULES, inputs(), mesh=mesh, micro_batches=PARTS if "pp" in mesh else None)
    for rank, found in enumerate(ranks):
        counted = budget.stages[rank // 2] if budget.stages else budget
        for name, step in ((mesh, counted.plain), (f"{mesh} checkpointed", counted.checkpointed)):
            real = found[name]
            for what in ("adapters", "optimizer", "gradients"):
                assert getattr(counted, what) == real[what]
            turns = 64 if rank > 1 and budget.stages else 0  # a stage that is not the first has a rotary embedding too
            assert counted.weights + turns == real["weights"]
            assert step.kept == pytest.approx(real["kept"], rel=0.1)
            assert step.flops == pytest.approx(real["flops"], rel=0.03)
            all_of_it = counted.total(step) - counted.optimizer
            assert all_of_it == pytest.approx(real["weights"] + real["adapters"] + real["peak"], rel=0.1)
