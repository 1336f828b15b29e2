"""Work for several processes: blocks that run as graphs while FSDP2 shards them, and the same without graphs."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora_fx
from tests.support.fiftysteps import fifty
from tests.support.sharded import (
    PLAIN,
    Block,
    Tokens,
    adapted,
    alike,
    files,
    refusal,
    rule,
    sharded,
    tokens,
    train,
    values_of,
)

RULES = {"version": 1, "rules": [rule("blocks.*.{q,v,up,down}")]}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def trained(folder: Path) -> dict[str, Any]:
    kinds: dict[str, Any] = {
        "plain": _plain,
        "bfloat16 policy": _policy,
        "autocast": _autocast,
        "wrapped before": _wrapped_before,
        "wrapped after": _wrapped_after,
        "sharded inside": _sharded_inside,
        "trained in bfloat16": _mixed,
        "llama checkpointed": functools.partial(_llama, folder=folder),
    }
    found = {name: {graphs: run(graphs) for graphs in ("auto", "modules")} for name, run in kinds.items()}
    if all(map(importlib.util.find_spec, ("bitsandbytes", "compressed_tensors", "hqq"))):
        from tests.support.packedshards import coded

        found["coded"] = coded(folder / "coded")
    return found | {"fifty": fifty()}


def _report(tuned: nn.Module, losses: list[float]) -> dict[str, Any]:
    regions = lora_fx.inspect(tuned).regions
    misses: dict[str, int] = {}
    for region in regions:
        for why, number in region.misses.items():
            misses[why] = misses.get(why, 0) + number
    return {
        "losses": losses,
        "hits": sum(region.hits for region in regions),
        "misses": misses,
        "text": str(lora_fx.inspect(tuned)),
    }


def _plain(backend: str) -> dict[str, Any]:
    tuned = sharded(adapted(RULES, backend=backend))
    return _report(tuned, train(tuned, 4))


def _policy(backend: str) -> dict[str, Any]:
    tuned = sharded(adapted(RULES, backend=backend), mp_policy=BFLOAT16)
    return _report(tuned, train(tuned, 4))


def _autocast(backend: str) -> dict[str, Any]:
    tuned = sharded(adapted(RULES, backend=backend))
    with torch.autocast("cpu", torch.bfloat16):
        return _report(tuned, train(tuned, 4))


def _wrapped_before(backend: str) -> dict[str, Any]:
    tuned = adapted(RULES, backend=backend)
    apply_activation_checkpointing(tuned, check_fn=lambda module: isinstance(module, Block))
    tuned = sharded(tuned)
    return _report(tuned, train(tuned, 4))


def _wrapped_after(backend: str) -> dict[str, Any]:
    tuned = sharded(adapted(RULES, backend=backend))
    apply_activation_checkpointing(tuned, check_fn=lambda module: isinstance(module, Block))
    result = _report(tuned, train(tuned, 4))
    same = alike(adapted(RULES, backend=backend), values_of(tuned))
    return result | {"merged": (values_of(lora_fx.merge(tuned)), values_of(lora_fx.merge(same)))}


def _sharded_inside(backend: str) -> dict[str, Any]:
    tuned: Any = adapted(RULES, backend=backend)
    for block in tuned.blocks:
        fully_shard(block.up)
    tuned = sharded(tuned)
    return _report(tuned, train(tuned, 4))


def _mixed(backend: str) -> dict[str, Any]:
    """A bfloat16 base whose norm and head are trained whole: float32 adapters and bfloat16 modules."""

    def tuned() -> Any:
        torch.manual_seed(3)
        return lora_fx.apply(Tokens().to(torch.bfloat16), PLAIN, (tokens(),), backend=backend)

    together = ""
    try:
        train(sharded(tuned()), 1)
    except AssertionError as error:  # torch's own
        together = str(error)
    apart = tuned()
    for module in (apart.norm, apart.head):
        fully_shard(module)
    sharded(apart)
    losses = train(apart, 4)
    merged = lora_fx.merge(apart)
    with torch.no_grad():
        difference = float((merged(tokens()).float() - apart(tokens()).float()).abs().max())
    return _report(apart, losses) | {"together": together, "difference": difference, "losses of one": train(tuned(), 4)}


def _llama(backend: str, folder: Path) -> dict[str, Any]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rules = {"version": 1, "rules": [rule("**.{q,v,up,down}_proj")]}
    example = {"input_ids": tokens(), "labels": tokens()}
    tuned: Any = lora_fx.apply(model, rules, example, backend=backend).train()
    for layer in tuned.model.layers:
        fully_shard(layer)
    fully_shard(tuned)
    optimizer = torch.optim.SGD(lora_fx.parameters(tuned), lr=0.5)
    losses = []
    for step in range(4):
        loss = tuned(input_ids=tokens(step), labels=tokens(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if backend == "auto":
        return {**_report(tuned, losses), **_saved_by_trainers(tuned, folder)}
    return _report(tuned, losses)


def _saved_by_trainers(tuned: Any, folder: Path) -> dict[str, Any]:
    """Save as trainers do: from every process, and from the main one with gathered values."""
    tuned.save_pretrained(folder / "every")
    state = get_model_state_dict(tuned, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tuned.save_pretrained(folder / "main", is_main_process=dist.get_rank() == 0, state_dict=state)
    alone = dist.get_rank() == 0
    parts = refusal(lambda: tuned.save_pretrained(folder / "parts", alone, tuned.state_dict())) if alone else ""
    dist.barrier()
    return {"every": files(folder / "every"), "main": files(folder / "main"), "parts": parts}
