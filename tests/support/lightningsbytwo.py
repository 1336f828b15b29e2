"""Work for two processes: Lightning's Trainer by its strategies for several, beside one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.integrations.lightning import LightningAdapterCheckpoints, load_adapter_checkpoint
from tests.support.aftershards import steps_of
from tests.support.sharded import adapted, base, files, rule, sharded, tokens

RULES = {"version": 1, "rules": [rule("blocks.*.{q,v,up,down}"), rule("embed"), rule("head")]}
STEPS = 5


class Fitted(lightning.LightningModule):
    """Trains as `steps_of` does; with a mesh of Lightning's it is sharded."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.losses = model, list[float]()

    def configure_model(self) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None:
            sharded(self.model, mesh=mesh["data_parallel"])

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        loss = self.model(batch).square().mean()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        self.losses.append(mean.item() / dist.get_world_size())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora_fx.parameters(self.model), lr=1e-3)


def fitted(folder: Path) -> dict[str, Any]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
    same = adapted(RULES)
    result: dict[str, Any] = {"of one": steps_of(same, tokens, STEPS, together=True)}
    parallel = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    module = _fit(parallel, folder / "ddp", LightningAdapterCheckpoints())
    result["ddp"] = module.losses, _saved(module, folder / "ddp")
    written = next((folder / "ddp").rglob("*.ckpt"))
    read = Fitted(lora_fx.apply(base(), RULES, (tokens(),)))
    load_adapter_checkpoint(read, written)
    result["read"] = dict(lora_fx.adapter_state(read.model)), dict(lora_fx.adapter_state(module.model))
    try:
        _fit(_sharding(), folder / "refused", LightningAdapterCheckpoints())
    except RefusedError as error:
        result["refused"] = str(error)
    module = _fit(_sharding(), folder / "fsdp")
    result["fsdp"] = module.losses, _saved(module, folder / "fsdp")
    return result


def _sharding() -> Any:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def _fit(strategy: Any, folder: Path, *callbacks: Any) -> Fitted:
    module, batches = Fitted(adapted(RULES)), torch.cat([tokens(step) for step in range(STEPS)])
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks), use_distributed_sampler=False,
        enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    sampler = DistributedSampler(batches, shuffle=False)  # type: ignore[arg-type]  # Lightning's own would shuffle
    trainer.fit(module, DataLoader(batches, batch_size=2, sampler=sampler))  # type: ignore[arg-type]
    return module


def _saved(module: Fitted, folder: Path) -> list[str]:
    if dist.get_rank() == 0 or hasattr(next(lora_fx.parameters(module.model)), "placements"):
        lora_fx.save(module.model, folder / "adapter")
    dist.barrier()
    return list(files(folder / "adapter"))
