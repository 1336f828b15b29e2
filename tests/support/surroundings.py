"""Work for several processes: what stands around adapted models elsewhere in torch, beside one process that has all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, register_fsdp_forward_method
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from tests.support.aftershards import steps_of
from tests.support.sharded import (
    Block,
    Tokens,
    adapted,
    alike,
    all_of,
    base,
    refusal,
    rule,
    sharded,
    tokens,
    values_of,
)

RULES = {"version": 1, "rules": [rule("blocks.*.{q,v,up,down}"), rule("embed"), rule("head")]}


def by_two(folder: Path) -> dict[str, Any]:
    of_one = steps_of(adapted(RULES), tokens, 5, together=True)
    return {
        "parallel": {name: _data_parallel(options) for name, options in OPTIONS.items()} | {"of one": of_one},
        "prepared": _prepared(),
        "offloaded": {name: _offloaded(later, folder / name) for name, later in (("before", False), ("after", True))},
        "registered": {name: _registered(later, folder) for name, later in (("before", False), ("after", True))},
        "schedules": {name: _scheduled(name) for name in SCHEDULES} | {"traced": _traced()},
    }


# -- data parallel

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "views of buckets": {"gradient_as_bucket_view": True},
    "without a first broadcast": {"init_sync": False},
}


def _data_parallel(options: dict[str, Any]) -> tuple[list[float], int]:
    tuned = adapted(RULES)
    losses = steps_of(DistributedDataParallel(tuned, **options), tokens, 5, together=False)
    return losses, sum(sum(region.misses.values()) for region in lora_fx.inspect(tuned).regions)


def _prepared() -> dict[str, Any]:
    """A model that was wrapped before it is adapted: asked as it is, and taken out of its wrapper."""
    wrapped = DistributedDataParallel(base())
    tuned = alike(lora_fx.apply(wrapped.module, RULES, (tokens(),)), adapted(RULES).state_dict())
    losses = steps_of(DistributedDataParallel(tuned), tokens, 5, together=False)
    return {"asked": refusal(lambda: lora_fx.apply(wrapped, RULES, (tokens(),))), "losses": losses}


# -- methods that are called in the place of the forward


class Scored(Tokens):
    """The same with a method that FSDP2 is told of, as trainers do of `generate`."""

    def scores(self, tokens: Tensor) -> Tensor:
        return self(tokens).softmax(-1) + self.norm.weight.sum()


def _registered(later: bool, folder: Path) -> dict[str, Any]:
    """Whatever comes back has the method, and what is bound to an instance by others is bound to what comes back."""
    model, whole_model = (_scored() for _ in range(2))
    same = alike(lora_fx.apply(whole_model, RULES, (tokens(),)), adapted(RULES).state_dict())
    tuned = _told(sharded(model)) if later else alike(lora_fx.apply(model, RULES, (tokens(),)), same.state_dict())
    if later:
        lora_fx.save(same, folder / f"scored {dist.get_rank()}")
        tuned = lora_fx.load(tuned, folder / f"scored {dist.get_rank()}", (tokens(),))
    else:
        tuned = _told(sharded(tuned))
    given: Any = tokens(2)
    lora_fx.save(tuned, folder / f"registered {later}")
    expected = {"tuned": same, "merged": lora_fx.merge(same), "removed": lora_fx.remove(same)}
    found = {"tuned": tuned, "merged": lora_fx.merge(tuned), "removed": lora_fx.remove(tuned)}
    lora_fx.add(tuned, {"version": 1, "rules": [rule("head")]}, adapter="b")
    lora_fx.drop(tuned, "b")
    with torch.no_grad():
        return {name: (one.scores(given), expected[name].scores(given)) for name, one in found.items()} | {
            "bound": [one.mine() is one for one in found.values()]
        }


def _scored() -> Scored:
    torch.manual_seed(3)
    return Scored()


def _told(model: Any) -> Any:
    register_fsdp_forward_method(model, "scores")
    model.mine = MethodType(lambda own: own, model)
    return model


# -- parameters that wait elsewhere


def _offloaded(later: bool, folder: Path) -> dict[str, Any]:
    """On processors the policy keeps parameters where they are, and goes all other ways that it has."""
    policy, values = CPUOffloadPolicy(pin_memory=False), adapted(RULES).state_dict()
    tuned = sharded(base() if later else adapted(RULES), offload_policy=policy)
    if later:
        tuned = lora_fx.apply(tuned, RULES, (tokens(),))
        lora_fx.load_adapter_state(tuned, {name: values[name] for name in lora_fx.adapter_state(tuned)})
    losses = steps_of(tuned, tokens, 5, together=False)
    return {"losses": losses} | all_of(tuned, alike(adapted(RULES), values_of(tuned)), folder)


# -- pipelines

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
IN_A_V = ("ZBVZeroBubble", "DualPipeV")
X, GOAL = (torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def _stack() -> nn.Sequential:
    torch.manual_seed(3)
    rules = {"version": 1, "rules": [rule("*.{q,v,up,down}", init="random")]}
    tuned: Any = lora_fx.apply(nn.Sequential(*(Block(16) for _ in range(4))), rules, (X[:2],))
    return tuned


def _loss(given: Tensor, goal: Tensor) -> Tensor:
    return (given - goal).square().mean()


def _scheduled(name: str) -> dict[str, Any]:
    tuned, kind = _stack(), get_schedule_class(name)
    several, rank = issubclass(kind, PipelineScheduleMulti), dist.get_rank()
    number = 4 if several else 2
    held = [rank, number - 1 - rank if name in IN_A_V else rank + 2][: number // 2]
    parts = {at: nn.Sequential(*list(tuned)[at * 4 // number : (at + 1) * 4 // number]) for at in held}
    stages = [pipelining.PipelineStage(part, at, number, torch.device("cpu")) for at, part in parts.items()]
    schedule = kind(stages if several else stages[0], n_microbatches=4, loss_fn=_loss)
    own = [parameter for part in parts.values() for parameter in lora_fx.parameters(part)]
    return _stepped(schedule, own, 0 in held, number - 1 in held) | {"hits": _hits(tuned)}


def _traced() -> dict[str, Any]:
    """Stages that torch cuts out of an exported program."""
    rank = dist.get_rank()
    cut = pipelining.pipeline(_stack(), (X[:2],), split_spec={"2": pipelining.SplitPoint.BEGINNING})
    stage = cut.build_stage(rank, torch.device("cpu"))
    own = [parameter for name, parameter in stage.submod.named_parameters() if ".lora_" in name]
    return _stepped(pipelining.Schedule1F1B(stage, n_microbatches=4, loss_fn=_loss), own, rank == 0, rank == 1)


def _stepped(schedule: Any, own: list[Tensor], first: bool, last: bool) -> dict[str, Any]:
    """Return losses, where the last stage is, and those of one process."""
    optimizer, losses = torch.optim.AdamW(own, lr=1e-2), []
    for _ in range(5):
        parts: list[Tensor] = []
        schedule.step(*((X,) if first else ()), **({"target": GOAL, "losses": parts} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        losses += [torch.stack(parts).mean().item()] if last else []
    return {"losses": losses, "of one": _of_one(), "trained": len(own)}


def _of_one() -> list[float]:
    tuned, losses = _stack(), []
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
    for _ in range(5):
        loss = _loss(tuned(X), GOAL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _hits(tuned: nn.Module) -> int:
    return sum(region.hits for region in lora_fx.inspect(tuned).regions)


# -- checkpoints of adapters, from one mesh onto another


def _split() -> dict[str, Any]:
    columns = {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "up")}
    ends = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("embed", "head")}
    return {**columns, **{f"blocks.*.{name}": RowwiseParallel() for name in ("v", "down")}, **ends}


def _both(tuned: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layer"))
    return sharded(parallelize_module(tuned, mesh["layer"], _split()), mesh=mesh["data"])


PLACED: dict[str, Callable[[Any], Any]] = {
    "fully_shard": sharded,
    "tensor parallel": lambda tuned: parallelize_module(tuned, init_device_mesh("cpu", (4,)), _split()),
    "both, two by two": _both,
    "replicated, two by two": lambda tuned: sharded(
        tuned, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("same", "data"))
    ),
    "whole": lambda tuned: tuned,
}


def from_mesh_to_mesh(folder: Path) -> dict[str, Any]:
    """Return, for each mesh that wrote and each that read, what was read beside what was written."""
    values = {name: value.clone() for name, value in lora_fx.adapter_state(adapted(RULES)).items()}
    for number, place in enumerate(PLACED.values()):
        checkpoint.save(lora_fx.adapter_state(place(adapted(RULES))), checkpoint_id=folder / str(number))
    return {name: [_read(place, folder / str(n)) for n in range(len(PLACED))] for name, place in PLACED.items()} | {
        "values": values
    }


def _read(place: Callable[[Any], Any], folder: Path) -> dict[str, Tensor]:
    tuned = place(lora_fx.apply(base(), RULES, (tokens(),)))
    state = lora_fx.adapter_state(tuned)
    checkpoint.load(state, checkpoint_id=folder)
    lora_fx.load_adapter_state(tuned, state)
    found = values_of(tuned)
    return {name: found[name] for name in state}
