"""Work for two processes: DeepSpeed's ZeRO around adapted models, on processors, beside one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lora_fx
from tests.support.aftershards import steps_of
from tests.support.sharded import adapted, base, refusal, rule, tokens

RULES = {"version": 1, "rules": [rule("blocks.*.{q,v,up,down}")]}
STEPS = 5


def by_each_stage(folder: Path) -> dict[int, dict[str, Any]]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # its own shared memory is compiled for a minute; gloo is there
    same = adapted(RULES)
    of_one = steps_of(same, tokens, STEPS, together=True)
    return {stage: _trained(stage, same, folder / str(stage)) | {"of one": of_one} for stage in (1, 2, 3)}


def _trained(stage: int, same: Any, folder: Path) -> dict[str, Any]:
    import deepspeed

    tuned = adapted(RULES)
    settings = {
        "train_micro_batch_size_per_gpu": 4 // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,  # it clips to 1 if nothing is said
    }
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-3)
    engine = deepspeed.initialize(model=tuned, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    losses = []
    for step in range(STEPS):
        loss = engine(tokens(step).chunk(dist.get_world_size())[dist.get_rank()]).square().mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    asked = {"save": lambda: lora_fx.save(tuned, folder / str(dist.get_rank())), "merge": lambda: lora_fx.merge(tuned)}
    result: dict[str, Any] = {"losses": losses, "refused": {name: refusal(work) for name, work in asked.items()}}
    result["hits"] = sum(region.hits for region in lora_fx.inspect(tuned).regions if region.path.startswith("blocks."))
    if stage == 3:
        with deepspeed.zero.GatheredParameters(list(lora_fx.parameters(tuned))):
            if dist.get_rank() == 0:
                lora_fx.save(tuned, folder / "gathered")
        dist.barrier()
        loaded = lora_fx.load(base(), folder / "gathered")
        result["gathered"] = dict(lora_fx.adapter_state(loaded)), dict(lora_fx.adapter_state(same))
    return result
