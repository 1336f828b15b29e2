"""Work for several processes: fifty steps in each way of training on several, beside one process with the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from tests.support.aftershards import steps_of
from tests.support.sharded import Block, adapted, rule, sharded, tokens

STEPS = 50
RULES = {"version": 1, "rules": [rule("blocks.*.{q,v,up,down}"), rule("embed"), rule("head")]}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def fifty() -> dict[str, Any]:
    """Return losses of each way, of one process with all data, and how many calls of blocks were graphs."""
    found = in_float32()
    rounded = _by_first(lambda: _parts_in_bfloat16(adapted(RULES, backend="modules")))
    found["bfloat16 policy"] = (*_trained(_policy), rounded)
    found["bfloat16 policy without graphs"] = (*_trained(lambda: _policy("modules")), rounded)
    return found


def in_float32(*but: str) -> dict[str, Any]:
    """Return the same of the ways that round nothing, but some."""
    of_one = _by_first(lambda: steps_of(adapted(RULES, backend="modules"), tokens, STEPS, together=True))
    return {name: (*_trained(make), of_one) for name, make in WAYS.items() if name not in but}


def _by_first(compute: Callable[[], list[float]]) -> list[float]:
    """Let the first process alone compute something for all."""
    given = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(given)
    assert given[0] is not None
    return given[0]


def _trained(make: Callable[[], nn.Module]) -> tuple[list[float], int]:
    model = make()
    losses = steps_of(model, tokens, STEPS, together=False)
    tuned = model.module if isinstance(model, DistributedDataParallel) else model
    return losses, sum(one.hits for one in lora_fx.inspect(tuned).regions if one.path.startswith("blocks."))


def _checkpointed() -> nn.Module:
    tuned = adapted(RULES)
    apply_activation_checkpointing(tuned, check_fn=lambda module: isinstance(module, Block))
    return sharded(tuned)


def _policy(backend: str = "auto") -> nn.Module:
    return sharded(adapted(RULES, backend=backend), mp_policy=BFLOAT16)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "data parallel": lambda: DistributedDataParallel(adapted(RULES)),
    "fully_shard": lambda: sharded(adapted(RULES)),
    "checkpointed": _checkpointed,
}


def _parts_in_bfloat16(same: nn.Module) -> list[float]:
    """Train in one process as the policy does: parameters rounded for each part of a batch, gradients summed in float32."""
    optimizer = torch.optim.AdamW(lora_fx.parameters(same), lr=1e-3)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for part in tokens(step).chunk(dist.get_world_size()):
            rounded = {name: parameter.to(torch.bfloat16) for name, parameter in same.named_parameters()}
            loss = functional_call(same, rounded, (part,)).square().mean() / dist.get_world_size()
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
