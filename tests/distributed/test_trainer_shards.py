"""transformers' Trainer under FSDP2: checkpoints, what resumes from them, what is saved at the end."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support import trainershards
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("accelerate")
    return in_processes(2, trainershards.trained, tmp_path_factory.mktemp("trainer"), fresh=True)


def test_a_training_resumes_from_a_checkpoint_as_if_it_had_not_stopped(ranks):
    for rank in ranks:
        torch.testing.assert_close(*rank["values"], rtol=1e-5, atol=1e-6)  # first calls round as no graph
        assert len(rank["losses"]) == trainershards.STEPS
        assert rank["noted"] == pytest.approx(rank["losses"], rel=1e-3)


def test_checkpoints_hold_the_adapter_which_loads_beside_a_whole_base(ranks):
    for rank in ranks:
        saved, end = rank["files"]
        assert {name: saved[name] for name in ADAPTER} == {name: end[name] for name in ADAPTER}
        loaded, expected = rank["loaded"]
        assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []


def test_generate_of_which_the_trainer_tells_fsdp_goes_on_in_what_is_merged(ranks):
    for rank in ranks:
        assert torch.equal(*rank["generated"])
