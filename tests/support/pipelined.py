"""Work for two processes: the halves of an adapted decoder as the stages of a pipeline, beside the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import lora_fx
from tests.support.sharded import PLAIN, adapted, files, tokens


class Stage(nn.Module):
    """A half of a decoder: its own modules, by the names that they have there."""

    def __init__(self, tuned: Any, number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): tuned.blocks[number]})
        self.embed = tuned.embed if number == 0 else None
        self.norm, self.head = (tuned.norm, tuned.head) if number == 1 else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(self.norm(x)) * 1.5


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return (logits - target).square().mean()


def pipelined(folder: Path) -> dict[str, Any]:
    """Losses, what is saved when the first process has the values of both, and which blocks ran as graphs."""
    tuned, same, rank = adapted(PLAIN), adapted(PLAIN, backend="modules"), dist.get_rank()
    half = Stage(tuned, rank)
    stage = PipelineStage(half, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_of)
    own = list(lora_fx.parameters(half))
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    target, losses = torch.ones(4, 6, 33), []
    for step in range(3):
        parts: list[Tensor] = []
        schedule.step(*((tokens(step),) if rank == 0 else ()), **({"target": target, "losses": parts} if rank else {}))
        losses.append(sum(part.item() for part in parts) / 2)
        optimizer.step()
        optimizer.zero_grad()
    hits = sum(region.hits for region in lora_fx.inspect(tuned).regions)
    for name, tensor in lora_fx.adapter_state(tuned).items():
        dist.broadcast(tensor, src=0 if name.startswith(("embed", "blocks.0")) else 1)
    if rank == 0:
        lora_fx.save(tuned, folder / "adapter")
    expected = _alone(same, target)
    dist.barrier()
    return {
        "losses": losses if rank else expected,  # the last stage has them
        "losses of one": expected,
        "own": len(own),
        "all": len(list(lora_fx.parameters(tuned))),
        "hits": hits,
        "files": sorted(files(folder / "adapter")),
        "values": (dict(lora_fx.adapter_state(tuned)), dict(lora_fx.adapter_state(same))),
    }


def _alone(same: nn.Module, target: Tensor) -> list[float]:
    optimizer, losses = torch.optim.AdamW(lora_fx.parameters(same), lr=1e-2), []
    for step in range(3):
        loss = loss_of(same(tokens(step)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
