"""Work for four processes: two parts of each batch, each for two processes that share layers (FSDP2 and tensor parallel)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lora_fx
from tests.support.fiftysteps import in_float32
from tests.support.parallel import both_adapters, grow, rules
from tests.support.sharded import (
    SLICED,
    adapted,
    alike,
    base,
    files,
    refusal,
    replicated,
    rule,
    sharded,
    tokens,
    values_of,
)

RULES = rules(rule("blocks.*.{q,v,up,down}"), rule("embed"), rule("head"))
LATER = rules(rule("blocks.*.{q,v,up,down}", dora=True, bias=True), train=["norm", "head"])
STYLES = {
    "blocks.0.q": ColwiseParallel(),
    "blocks.0.v": RowwiseParallel(),
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
"""The first block and the head are split; the second block is not."""


def by_four(folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layer"))
    return replicated(folder) | {
        "two by two": _trained(mesh),
        "grown": _grown(folder / "grown", mesh),
        "later": _later(folder / "later", mesh),
        "fifty": _fifty(),
    }


def _fifty() -> dict[str, tuple[list[float], int, list[float]]]:
    """Train in each way, and layers that all four processes share; return losses, hits of blocks, losses of one."""
    found = in_float32("data parallel")  # pairs that have the same are
    tuned: Any = adapted(RULES)
    parallelize_module(tuned, init_device_mesh("cpu", (4,)), STYLES)
    losses = _train(tuned, None)
    hits = sum(region.hits for region in lora_fx.inspect(tuned).regions if region.path.startswith("blocks."))
    return found | {"split": (losses, hits, found["fully_shard"][2])}


def _shared(model: Any, mesh: Any) -> Any:
    """Split layers over pairs, and shard what each has over the pairs; in place."""
    parallelize_module(model, mesh["layer"], STYLES)
    return sharded(model, mesh=mesh["data"])


def _trained(mesh: Any) -> dict[str, Any]:
    tuned, same = _shared(adapted(RULES), mesh), adapted(RULES)
    result: dict[str, Any] = {"losses": (_train(tuned, mesh), _train(same, None))}
    result["hits"] = {region.path: region.hits for region in lora_fx.inspect(tuned).regions}
    alike(same, values_of(tuned))
    with torch.no_grad():
        return result | {"output": (tuned(tokens()), same(tokens()))}


def _read_off(tuned: nn.Module, same: nn.Module, folder: Path) -> dict[str, Any]:
    """Return what is read from a model that processes share, and from one with its values that is whole."""
    before = values_of(tuned)
    alike(same, before)
    lora_fx.save(tuned, folder / "shared")
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    merged, removed = lora_fx.merge(tuned), lora_fx.remove(tuned)
    with torch.no_grad():
        result: dict[str, Any] = {"output": (tuned(tokens()), same(tokens()))}
        with lora_fx.disabled(tuned):
            result["output of base"] = tuned(tokens()), base()(tokens())
        result["output of merged"] = merged(tokens()), same(tokens())
        result["output of removed"] = removed(tokens()), base()(tokens())
    return result | {
        "files": (files(folder / "shared"), files(folder / "whole")),
        "merged": (values_of(merged), values_of(lora_fx.merge(same))),
        "removed": (values_of(removed), base().state_dict()),
        "unchanged": (before, values_of(tuned)),
        "listed": (str(lora_fx.list_adapters(tuned)), str(lora_fx.list_adapters(same))),
        "placed": _placed(tuned),
        "placed again": (_placed(merged), _placed(removed)),
    }


def _placed(model: nn.Module) -> dict[str, str]:
    return {name: str(p.placements) for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def _grown(folder: Path, mesh: Any) -> dict[str, Any]:
    """Adapters are added, combined, swapped, dropped and renamed in place, and train then."""
    tuned, same = _shared(both_adapters("auto"), mesh), both_adapters()
    optimizer = torch.optim.SGD(lora_fx.parameters(tuned), lr=0.0)
    for model, seed in ((tuned, 7 + dist.get_rank()), (same, 7)):  # the values of the first process are taken
        torch.manual_seed(seed)
        grow(model, folder)
    there = set(map(id, tuned.parameters()))
    result: dict[str, Any] = {
        "grown": (values_of(tuned), values_of(same)),
        "kept": sum(id(p) in there for group in optimizer.param_groups for p in group["params"]),
        "losses": (_train(tuned, mesh, 5), _train(same, None, 5)),
        "slices": refusal(lambda: lora_fx.add(tuned, SLICED, adapter="x")),
    }
    trained = values_of(tuned)
    alike(same, trained)
    lora_fx.load_adapter_state(tuned, lora_fx.adapter_state(same))
    return result | {"state": (values_of(tuned), trained)} | _read_off(tuned, same, folder)


def _later(folder: Path, mesh: Any) -> dict[str, Any]:
    """A model that is shared already is adapted, and an adapter loaded into it."""
    model = _shared(base(), mesh)
    torch.manual_seed(5 + dist.get_rank())
    tuned = lora_fx.apply(model, LATER, (tokens(),))
    plain = base()
    torch.manual_seed(5)
    same = lora_fx.apply(plain, LATER, (tokens(),))
    for one, seed in ((tuned, 7 + dist.get_rank()), (same, 7)):
        torch.manual_seed(seed)
        lora_fx.add(one, rules(rule("blocks.1.q", init="random"), train=["head"]), adapter="b")
        lora_fx.use(one, "b")
    result: dict[str, Any] = {"first": (values_of(tuned), values_of(same))}
    result["losses"] = _train(tuned, mesh, 3), _train(same, None, 3)
    for one in (tuned, same):
        lora_fx.use(one, "default")
    result["losses of first"] = _train(tuned, mesh, 3), _train(same, None, 3)
    result |= _read_off(tuned, same, folder)
    loaded = lora_fx.load(model, folder / "whole", (tokens(),))
    return result | {
        "loaded": (values_of(loaded), values_of(tuned)),
        "base": (values_of(model), base().state_dict()),
        "slices": refusal(lambda: lora_fx.apply(model, SLICED)),
    }


def _train(model: Any, mesh: Any, steps: int = 50) -> list[float]:
    """Train; return the losses of all data. torch steps tensors of two meshes one by one alone."""
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-3, foreach=False)
    losses = []
    for step in range(steps):
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
