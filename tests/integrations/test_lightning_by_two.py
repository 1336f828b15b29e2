"""Lightning's Trainer in two processes, data parallel and with FSDP2's shards, beside one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import in_processes

pytest.importorskip("lightning")

from tests.support import lightningsbytwo

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of Lightning itself
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(2, lightningsbytwo.fitted, tmp_path_factory.mktemp("fitted"), seconds=900)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_strategy_trains_as_one_process_and_what_it_trained_is_saved(ranks, strategy):
    for rank in ranks:
        losses, saved = rank[strategy]
        torch.testing.assert_close(losses, rank["of one"], rtol=1e-5, atol=1e-5)
        assert saved == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_checkpoint_of_two_processes_holds_the_adapter_and_shards_are_refused_by_name(ranks):
    for rank in ranks:
        read, trained = rank["read"]
        assert all(torch.equal(read[name], value) for name, value in trained.items())
        assert "ModelParallelStrategy writes and reads checkpoints in its own way" in rank["refused"]
