"""Work for four processes: two parts of each batch, each for two processes that share layers (FSDP2 and tensor parallel)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lora_fx
from tests.support.sharded import adapted, alike, files, refusal, replicated, rule, sharded, tokens, values_of

RULES = {"version": 1, "rules": [rule("blocks.*.{q,v,up,down}"), rule("embed"), rule("head")]}
STYLES = {
    "blocks.0.q": ColwiseParallel(),
    "blocks.0.v": RowwiseParallel(),
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
"""The first block and the head are split; the second block is not, and runs as its graph."""


def by_four(folder: Path) -> dict[str, Any]:
    return replicated(folder) | {"two by two": two_by_two(folder / "two by two")}


def two_by_two(folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layer"))
    tuned, same = adapted(RULES), adapted(RULES)
    parallelize_module(tuned, mesh["layer"], STYLES)
    sharded(tuned, mesh=mesh["data"])
    result: dict[str, Any] = {"losses": (_train(tuned, mesh), _train(same, None))}
    result["hits"] = {region.path: region.hits for region in lora_fx.inspect(tuned).regions}
    values = values_of(tuned)
    alike(same, values)
    lora_fx.save(tuned, folder / "sharded")
    there = files(folder / "sharded")
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    result["files"] = there, files(folder / "whole")
    with torch.no_grad():
        result["output"] = tuned(tokens()), same(tokens())
        with lora_fx.disabled(tuned), lora_fx.disabled(same):
            result["output of base"] = tuned(tokens()), same(tokens())
    norms = [lora_fx.list_adapters(model)["default"].norm for model in (tuned, same)]
    result["norm"] = norms
    more = {"version": 1, "rules": [rule("blocks.*.q")]}
    result["refused"] = {
        "merge": refusal(lambda: lora_fx.merge(tuned)),
        "remove": refusal(lambda: lora_fx.remove(tuned)),
        "add": refusal(lambda: lora_fx.add(tuned, more, adapter="b")),
    }
    lora_fx.load_adapter_state(tuned, {name: values[name] for name in lora_fx.adapter_state(tuned)})
    return result | {"unchanged": (values, values_of(tuned))}


def _train(model: Any, mesh: Any) -> list[float]:
    """Train for fifty steps; return the losses of all data. torch steps tensors of two meshes one by one alone."""
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-3, foreach=False)
    losses = []
    for step in range(50):
        given = tokens(step) if mesh is None else tokens(step).chunk(2)[mesh.get_local_rank("data")]
        loss = model(given).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(mean, group=mesh.get_group("data"))
            mean /= 2
        losses.append(mean.item())
    return losses
