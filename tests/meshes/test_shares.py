"""What each process holds of a model that FSDP2 shards goes down in proportion to how many there are."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import lora_fx
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]
LASTING = ("weights", "adapters", "optimizer", "gradients")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.support import metered

    (rank,) = in_processes(1, metered.by_all, tmp_path_factory.mktemp("one"))
    return rank


@pytest.mark.parametrize("number", [2, 4])
def test_each_of_several_processes_has_its_part_of_what_one_has_and_of_what_is_counted(alone, number, tmp_path):
    from tests.support import metered

    budget = lora_fx.budget(metered.llama(), metered.RULES, metered.inputs(), mesh=f"dp={number}")
    for rank in in_processes(number, metered.by_all, tmp_path):
        for way, step in (("all", budget.plain), ("all checkpointed", budget.checkpointed)):
            one, found = alone[way], rank[way]
            for what in LASTING:
                assert found[what] == pytest.approx(one[what] / number, rel=0.01), "but buffers, which are whole"
                assert found[what] == getattr(budget, what)
            assert metered.at_most(found) == pytest.approx(budget.total(step), rel=0.1)
