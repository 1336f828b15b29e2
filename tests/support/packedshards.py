"""Work for several processes: bases of bitsandbytes whose codes FSDP2 shards, and the same ones whole beside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lora_fx
from tests.support.packedkinds import model_of
from tests.support.sharded import files, refusal, rule

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
RULES = {"version": 1, "rules": [rule("*.{up,down}", bias=True)]}
KIND = "NF4 with double quantisation"


def packed(folder: Path) -> dict[str, Any]:
    """Train, save and ask what cannot be done."""
    torch.manual_seed(3)
    model = model_of(KIND)
    same = lora_fx.apply(model, RULES, (X,))
    tuned, mesh = sharded(copy.deepcopy(same)), init_device_mesh("cpu", (dist.get_world_size(),))
    result: dict[str, Any] = {"losses": (train(tuned), train(same))}
    lora_fx.save(tuned, folder / "sharded")
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    column = {"0.up": ColwiseParallel()}
    return result | {
        "files": (files(folder / "sharded"), files(folder / "whole")),
        "removed": (lora_fx.remove(tuned)(X).detach(), model(X).detach()),
        "merge": refusal(lambda: lora_fx.merge(tuned)),
        "apply": refusal(lambda: lora_fx.apply(sharded(copy.deepcopy(model)), RULES, (X,))),
        "parallel": refusal(lambda: parallelize_module(copy.deepcopy(same), mesh, column)),
    }


def sharded(model: Any) -> Any:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.SGD(lora_fx.parameters(model), lr=0.1), []
    for _ in range(3):
        loss = model(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
