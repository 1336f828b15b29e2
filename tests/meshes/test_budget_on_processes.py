"""What is counted for a mesh, beside what two processes really allocate."""

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

    return in_processes(2, metered.treated, tmp_path_factory.mktemp("metered"))


@pytest.mark.parametrize("axis", ["dp", "tp"])
def test_what_is_counted_is_what_two_processes_allocate(ranks, axis):
    from tests.support.metered import RULES, inputs, llama

    budget = lora_fx.budget(llama(), RULES, inputs(), mesh={axis: 2})
    for name, step in ((axis, budget.plain), (f"{axis} checkpointed", budget.checkpointed)):
        real = ranks[0][name]
        for what in ("weights", "adapters", "optimizer", "gradients"):
            assert getattr(budget, what) == real[what]
        assert step.kept == pytest.approx(real["kept"], rel=0.1)
        assert step.flops == pytest.approx(real["flops"], rel=0.02)
        all_of_it = budget.total(step) - budget.optimizer
        assert all_of_it == pytest.approx(real["weights"] + real["adapters"] + real["peak"], rel=0.1)
