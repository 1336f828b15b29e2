"""Work for two processes: a Llama that accelerate's FSDP2 plugin prepares, adapted before or after, beside a whole one.

accelerate shards on accelerators alone; on processors it is told that it has some, and does what it does there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lora_fx
from tests.support.llamas import read_base
from tests.support.parallel import rules
from tests.support.sharded import alike, files, rule, tokens, values_of

RULES = rules(rule("**.{q,v,up,down}_proj"), rule("lm_head"), train=["model.norm"])
STEPS = 10


def prepared(home: Path, folder: Path) -> dict[str, Any]:
    """Return what comes of each order; `before` also with the values of one process alone, and checkpointed."""
    accelerator = _accelerator()
    result: dict[str, Any] = {}
    for name, options in {
        "before": {"cpu_ram_efficient_loading": False},
        "before, loaded by one": {"cpu_ram_efficient_loading": True},
        "before, checkpointed": {"cpu_ram_efficient_loading": False, "activation_checkpointing": True},
        "before, checkpointed, with a cache": {"cpu_ram_efficient_loading": False, "activation_checkpointing": True},
    }.items():
        model, plain = read_base(home, False), read_base(home, False)
        if name == "before, checkpointed":  # what is made again would meet the keys of the first time
            model.config.use_cache = plain.config.use_cache = False
        tuned, same = _adapted(model), _adapted(plain)
        alike(same, _of_first(values_of(tuned)))
        alike(tuned, values_of(same))
        optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-3)
        tuned, optimizer = _told(accelerator, options).prepare(tuned, optimizer)
        result[name] = _trained(accelerator, tuned, optimizer, same, folder / name)
    model = read_base(home, False)
    whole_model = torch.optim.SGD(model.parameters(), lr=0.0)  # accelerate prepares no model without an optimizer
    model, _ = _told(accelerator, {"cpu_ram_efficient_loading": False}).prepare(model, whole_model)
    tuned, same = _adapted(model), _adapted(read_base(home, False))
    alike(same, values_of(tuned))
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-3)
    result["after"] = _trained(accelerator, tuned, optimizer, same, folder / "after")
    return result


def _accelerator() -> Any:
    import accelerate

    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    return accelerate.Accelerator(cpu=True)


def _told(accelerator: Any, options: dict[str, Any]) -> Any:
    import accelerate

    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def _adapted(model: Any) -> Any:
    torch.manual_seed(dist.get_rank())  # each process draws otherwise
    return lora_fx.apply(model, RULES, {"input_ids": tokens()})


def _of_first(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for value in values.values():
        dist.broadcast(value, 0)
    return values


def _trained(accelerator: Any, tuned: Any, optimizer: Any, same: Any, folder: Path) -> dict[str, Any]:
    """Train on halves of each batch, and one process on all of it; save, merge and remove then."""
    other, losses, of_one = torch.optim.AdamW(lora_fx.parameters(same), lr=1e-3), [], []
    for step in range(STEPS):
        given = tokens(step)
        half = given.chunk(dist.get_world_size())[dist.get_rank()]
        loss = tuned(input_ids=half, labels=half).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        loss = same(input_ids=given, labels=given).loss
        loss.backward()
        other.step()
        other.zero_grad()
        of_one.append(loss.item())
    plain = accelerator.unwrap_model(tuned)
    trained = values_of(plain)
    trained = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in trained.items()}
    alike(same, trained)
    lora_fx.save(plain, folder / "sharded")
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    return {
        "losses": (losses, of_one),
        "hits": sum(one.hits for one in lora_fx.inspect(plain).regions if one.path.startswith("model.layers.")),
        "sharded": type(plain).__mro__[1].__name__,
        "files": (files(folder / "sharded"), files(folder / "whole")),
        "merged": (values_of(lora_fx.merge(plain)), values_of(lora_fx.merge(same))),
    }
