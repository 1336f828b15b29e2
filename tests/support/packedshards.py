"""Work for several processes: quantised bases whose codes FSDP2 shards, and the same ones whole beside them."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lora_fx
from lora_fx.models.shards import whole as gathered
from tests.support import codedmodels
from tests.support.packedkinds import model_of
from tests.support.sharded import files, keeps_no_more, refusal, rule, whole

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
    lora_fx.load_adapter_state(same, {name: whole(p) for name, p in lora_fx.adapter_state(tuned).items()})
    result |= _folded(tuned, same, X)
    return result | {
        "files": (files(folder / "sharded"), files(folder / "whole")),
        "removed": (lora_fx.remove(tuned)(X).detach(), model(X).detach()),
        "apply": refusal(lambda: lora_fx.apply(sharded(copy.deepcopy(model)), RULES, (X,))),
        "parallel": refusal(lambda: parallelize_module(copy.deepcopy(same), mesh, column)),
    }


def _folded(tuned: nn.Module, same: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Return what a sharded model and a whole one with its values merge to, into plain weights and into codes."""
    merged, of_one = lora_fx.merge(tuned), lora_fx.merge(same)
    again, costs = lora_fx.merged_and_requantised(tuned, "same")
    again_of_one, costs_of_one = lora_fx.merged_and_requantised(same, "same")
    values = [_bits_of(model) for model in (merged, of_one, again, again_of_one)]
    with torch.no_grad():
        outputs = (merged(x), of_one(x)), (again(x), again_of_one(x))
    return {
        "merged": values[:2],
        "quantised again": values[2:],
        "costs": (costs, costs_of_one),
        "outputs of merged": outputs,
        "own memory": [keeps_no_more(model) for model in (merged, again)],
        "refused to quantise": refusal(lambda: lora_fx.merge(tuned, requantize=lambda module: module)),
    }


def _bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all values of a model, gathered; those of one byte as bytes, as gloo knows no 8-bit floats."""
    values = {name: gathered(tensor) for name, tensor in model.state_dict().items()}
    return {name: value.view(torch.uint8) if value.dtype.itemsize == 1 else value for name, value in values.items()}


CODED = [
    "compressed-tensors W4A16, asymmetric",
    "compressed-tensors FP8",
    "compressed-tensors W8A8",
    "hqq 4 bits",
    "hqq 3 bits",
]
ROWS = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(1))


def coded(folder: Path) -> dict[str, Any]:
    """Train on halves of a batch, save, and ask what cannot be done; with DoRA where codes are 3 bits."""
    # with several processes the library sends what it compresses, and torch 2.13 unpickles no 8-bit floats
    importlib.import_module("compressed_tensors.compressors.model_compressors.model_compressor").is_distributed = bool
    return {kind: _coded(kind, folder / kind) for kind in CODED} | {"int8": _eight_bits()}


def _coded(kind: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(3)
    rules = {"version": 1, "rules": [rule("*.{up,down}", dora=kind == "hqq 3 bits")]}
    model = codedmodels.KINDS[kind]()
    same = lora_fx.apply(model, rules, (ROWS,))
    tuned = sharded(copy.deepcopy(same))
    codes = [p.dtype for name, p in tuned.named_parameters() if "0.up" in name and not p.dtype.is_floating_point]
    result: dict[str, Any] = {"losses": (train(tuned, ROWS, halves=True), train(same, ROWS)), "codes": codes}
    result["hits"] = [region.hits for region in lora_fx.inspect(tuned).regions]
    trained = {name: whole(p) for name, p in lora_fx.adapter_state(tuned).items()}
    result["trained"] = trained, {name: p.detach().clone() for name, p in lora_fx.adapter_state(same).items()}
    lora_fx.load_adapter_state(same, trained)
    lora_fx.save(tuned, folder / "sharded")
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    result |= _folded(tuned, same, ROWS)
    refused = {
        "add": refusal(lambda: lora_fx.add(tuned, rules, adapter="b")),
        "apply": refusal(lambda: lora_fx.apply(sharded(codedmodels.KINDS[kind]()), rules, (ROWS,))),
    }
    with torch.no_grad():
        result["output"] = tuned(ROWS), same(ROWS)  # refusals have changed nothing
        result["removed"] = lora_fx.remove(tuned)(ROWS), lora_fx.remove(same)(ROWS)
    return result | {"refused": refused, "files": (files(folder / "sharded"), files(folder / "whole"))}


def _eight_bits() -> str:
    tuned = sharded(lora_fx.apply(model_of("int8"), RULES, (X,)))
    return refusal(lambda: tuned(X))


def sharded(model: Any) -> Any:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module, x: torch.Tensor = X, halves: bool = False) -> list[float]:
    optimizer, losses = torch.optim.SGD(lora_fx.parameters(model), lr=0.1), []
    given = x.chunk(dist.get_world_size())[dist.get_rank()] if halves else x
    for _ in range(5):
        loss = model(given).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if halves:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses
