"""Work for two processes: a Llama that transformers loads by its `tp_plan` is adapted, beside one that is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lora_fx
from tests.support.accelerated import prepared
from tests.support.llamas import read_base, write_base
from tests.support.parallel import rules
from tests.support.sharded import alike, files, refusal, rule, tokens, values_of

LAYERS = "**.{q,k,v,o,gate,up,down}_proj"
RULES = rules(rule(LAYERS), rule("lm_head"), rule("**.embed_tokens", init="random"), train=["model.norm"])


def train(model: Any, steps: int) -> list[float]:
    """Train on the same data in every process; return the losses. torch steps no DTensors and plain tensors together."""
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-3, foreach=False)
    losses = []
    for step in range(steps):
        loss = model(input_ids=tokens(step), labels=tokens(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def planned(folder: Path) -> dict[str, Any]:
    """Everything that is done to a model that was loaded by its plan, beside the same on a whole one."""
    home = write_base(folder / "base")
    model, plain = read_base(home, True), read_base(home, False)
    example = {"input_ids": tokens()}
    torch.manual_seed(dist.get_rank())  # each process draws otherwise
    tuned = lora_fx.apply(model, RULES, example)
    same = lora_fx.apply(plain, RULES, example)
    first = values_of(tuned)
    alike(same, first)
    result: dict[str, Any] = {
        "plan": (str(lora_fx.plan(model, RULES)), str(lora_fx.plan(plain, RULES))),
        "first": first,
        "losses": (train(tuned, 50), train(same, 50)),
    }
    result["hits"] = [(r.hits, r.misses) for r in lora_fx.inspect(tuned).regions if "layers." in r.path]
    trained = values_of(tuned)
    alike(same, trained)
    result |= _read_off(tuned, same, folder, (values_of(model), plain.state_dict()))
    loaded = lora_fx.load(model, folder / "planned", example)
    result["loaded"] = values_of(loaded), trained
    result["outputs"]["loaded"] = _output(loaded), _output(same)
    for one in (tuned, same):
        lora_fx.add(one, rules(rule("**.{q,o}_proj"), rule("lm_head")), adapter="b")
        lora_fx.swap(one, {name: value + 0.5 for name, value in lora_fx.adapter_state(one, "b").items()}, adapter="b")
        lora_fx.use(one, {"default": 1, "b": 0.5})
    alike(same, values_of(tuned))  # each draws otherwise
    result["outputs"]["two"] = _output(tuned), _output(same)
    return result | {"refused": _refused(model), "accelerate": prepared(home, folder / "accelerate")}


def _read_off(tuned: Any, same: Any, folder: Path, base: Any) -> dict[str, Any]:
    lora_fx.save(tuned, folder / "planned")
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    merged, removed, of_one = lora_fx.merge(tuned), lora_fx.remove(tuned), lora_fx.merge(same)
    outputs = {"tuned": (_output(tuned), _output(same)), "with gradients": (_graded(tuned), _graded(same))}
    with lora_fx.disabled(tuned), lora_fx.disabled(same):
        outputs["base"] = _output(tuned), _output(same)
        outputs["base with gradients"] = _graded(tuned), _graded(same)
    outputs |= {
        "merged": (_output(merged), _output(of_one)),
        "removed": (_output(removed), _output(lora_fx.remove(same))),
    }
    generated = [one.generate(tokens(), max_new_tokens=4, do_sample=False) for one in (tuned, same)]
    return {
        "files": (files(folder / "planned"), files(folder / "whole")),
        "merged": (values_of(merged), values_of(of_one)),
        "removed": (values_of(removed), base[1]),
        "model": base,
        "outputs": outputs,
        "generated": generated,
        "placed": {name: p.placements for name, p in tuned.named_parameters() if hasattr(p, "placements")},
    }


def _output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return _graded(model)


def _graded(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens()).logits.detach()
    return logits


def _refused(model: nn.Module) -> dict[str, str]:
    asked = {
        "dora": rules(rule("**.q_proj", dora=True)),
        "bias": rules(rule("**.o_proj", bias=True)),
        "train": rules(rule("**.q_proj"), train=["lm_head"]),
        "slices": rules({**rule("**.up_proj"), "slices": {"of": ["a", "b", "c"], "adapt": ["a", "c"]}}),
        "rows": rules(rule("**.q_proj"), tokens=[{"name": "model.embed_tokens", "ids": [1, 5]}]),
    }
    return {name: refusal(lambda those=those: lora_fx.apply(model, those)) for name, those in asked.items()}
