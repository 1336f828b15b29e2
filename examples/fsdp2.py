"""Train an adapter on a model that FSDP2 shards: `torchrun --nproc-per-node 2 examples/fsdp2.py [folder]`."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_fx


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model() -> nn.Sequential:
    torch.manual_seed(0)  # the same base, and the same first values of adapters, in every process
    return nn.Sequential(*(Block(32) for _ in range(4)), nn.Linear(32, 2))


def main(folder: str) -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))  # starts the group of processes
    rank = dist.get_rank()
    x = torch.randn(8, 32, device=device)
    tuned = lora_fx.apply(model().to(device), r=4, target=["**.up", "**.down"], example_inputs=(x,))  # first this,
    for block in tuned:  # then shard: blocks keep their graphs
        fully_shard(block, mesh=mesh)
    fully_shard(tuned, mesh=mesh)

    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
    torch.manual_seed(1 + rank)  # other data in every process
    for _ in range(40):
        x = torch.randn(16, 32, device=device)
        loss = nn.functional.cross_entropy(tuned(x), (x.sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    lora_fx.save(tuned, folder)  # every process calls it, and the first writes
    merged = lora_fx.merge(tuned)  # sharded as the model is
    with torch.no_grad():
        difference = (merged(x) - tuned(x)).abs().max()
    if rank == 0:
        alone = lora_fx.load(model().to(device), folder)
        hits = sum(region.hits for region in lora_fx.inspect(tuned).regions)
        print(f"loss {loss:.3f}, {hits} calls of blocks ran as graphs, merged: max |Δ| {difference:.1g}")
        print(f"{folder} fits the model that is not sharded: {lora_fx.list_adapters(alone)}")
    dist.destroy_process_group()


main(sys.argv[1] if len(sys.argv) > 1 else "fsdp2-adapter")
