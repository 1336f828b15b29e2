"""Work for several processes: models that are sharded first and adapted then, beside those adapted first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lora_fx
from tests.support import sharded
from tests.support.sharded import alike, all_of, base, rule, tokens, values_of


class Mixture(nn.Module):
    """A convolution, a bank of experts and a head, as two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Experts(6, 4), Experts(6, 4)])
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Experts(nn.Module):
    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(number, width, width) / width)
        self.gate = nn.Linear(width, number)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        each = torch.einsum("eoi,bti->beto", self.bank, x)
        return x + torch.einsum("bte,beto->bto", shares, F.silu(each))


EXPERTS = {"version": 1, "rules": [rule("blocks.*.bank", share="A"), rule("blocks.*.gate", lora_fa=True)]}
CONVOLUTION = {"version": 1, "rules": [rule("conv", dora=True), rule("head", dora=True)]}


def mixture() -> nn.Module:
    torch.manual_seed(3)
    return Mixture()


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


Kind = tuple[Callable[[], nn.Module], dict[str, Any], Callable[[int], Tensor]]
KINDS: dict[str, Kind] = {name: (base, rules, tokens) for name, rules in sharded.RULES.items()}
KINDS |= {"experts": (mixture, EXPERTS, images), "convolution": (mixture, CONVOLUTION, images)}


def steps_of(model: nn.Module, inputs: Callable[[int], Tensor], number: int, together: bool) -> list[float]:
    """Train; each process has its part of the data, or all of it. Return the losses of all of it."""
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-3)
    losses = []
    for step in range(number):
        given = inputs(step)
        loss = model(given if together else given.chunk(dist.get_world_size())[dist.get_rank()]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if not together:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


FEW = ("plain",)
MANY = tuple(name for name in KINDS if name not in FEW)


def few_adapted_later(folder: Path) -> dict[str, Any]:
    return {name: _adapted_later(name, *KINDS[name], folder) for name in FEW} | {
        "refused": _refused_later(),
        "grown": grown(folder),
    }


def many_adapted_later(folder: Path) -> dict[str, Any]:
    return {name: _adapted_later(name, *KINDS[name], folder) for name in MANY}


def _adapted_later(name: str, make: Any, rules: dict[str, Any], inputs: Any, folder: Path) -> dict[str, Any]:
    model = sharded.sharded(make())
    before = values_of(model)
    torch.manual_seed(5 + dist.get_rank())  # each process draws other first values
    tuned = lora_fx.apply(model, rules, (inputs(1),))
    plain = make()
    torch.manual_seed(5)
    same = lora_fx.apply(plain, rules, (inputs(1),))
    result: dict[str, Any] = {
        "first": (values_of(tuned), values_of(same)),
        "placements": [str(getattr(p, "placements", "whole")) for p in lora_fx.parameters(tuned)],
        "plan": (str(lora_fx.plan(model, rules)), str(lora_fx.plan(plain, rules))),
    }
    steps = 50 if name == "plain" else 4
    result["losses"] = steps_of(tuned, inputs, steps, together=False), steps_of(same, inputs, steps, together=True)
    result["hits"] = sum(region.hits for region in lora_fx.inspect(tuned).regions)
    trained = values_of(tuned)
    result |= all_of(tuned, alike(same, trained), folder / name, inputs(1))
    loaded = lora_fx.load(model, folder / name / "whole", (inputs(1),))
    modules = lora_fx.apply(model, rules, (inputs(1),), backend="modules")
    modules.load_state_dict(tuned.state_dict())
    with torch.no_grad():
        result["output of loaded"] = (loaded(inputs(1)), same(inputs(1)))
        result["output of modules"] = (modules(inputs(1)), same(inputs(1)))
        result["output of model"] = (model(inputs(1)), plain(inputs(1)))
    result["loaded"] = (values_of(loaded), trained)
    result["model"] = (values_of(model), before)
    return result


def _refused_later() -> dict[str, str]:
    """What cannot be adapted once it is sharded."""
    alone, mixed = base(), base().bfloat16()
    for block in alone.get_submodule("blocks").children():
        fully_shard(block)
    sharded.sharded(mixed)
    everywhere = {"version": 1, "rules": [rule("blocks.*.q"), rule("head")]}
    rows = {"version": 1, "rules": [rule("blocks.*.q")], "tokens": [{"name": "embed", "ids": [1, 5]}]}
    trained = {"version": 1, "rules": [rule("**.q"), rule("embed")], "train": ["norm"]}
    whole_model = sharded.sharded(base())
    refusal = sharded.refusal
    return {
        "outside": refusal(lambda: lora_fx.apply(alone, everywhere, (tokens(),))),
        "dtypes": refusal(lambda: lora_fx.apply(mixed, trained, (tokens(),))),
        "rows": refusal(lambda: lora_fx.apply(whole_model, rows, (tokens(),))),
        "data": refusal(lambda: lora_fx.plan_from_data(whole_model, everywhere, [(tokens(),)])),
        "ranks": refusal(lambda: lora_fx.allocate(whole_model, everywhere, 1000)),
    }


# -- more adapters on a model that is sharded and has been trained


FIRST = {"version": 1, "rules": [rule("blocks.*.{q,up,down}"), rule("embed")]}
MORE = {"version": 1, "rules": [rule("blocks.*.{q,v}", init="random"), rule("head")], "train": ["norm"]}
CLASHING = {"version": 1, "rules": [rule("blocks.*.v")], "train": ["blocks.0.q"]}


def grown(folder: Path) -> dict[str, Any]:
    """Adapters are added, combined and swapped in place, beside the same on a whole model."""
    tuned, same = lora_fx.apply(_tail_together(base()), FIRST, (tokens(),)), lora_fx.apply(base(), FIRST, (tokens(),))
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "saved")
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
    _step(tuned, optimizer, 0)
    alike(same, values_of(tuned))
    handle, told = tuned.register_forward_hook(lambda *_: None), _tell(tuned)
    result: dict[str, Any] = {"clashing": sharded.refusal(lambda: lora_fx.add(tuned, CLASHING, adapter="b"))}
    result["unchanged"] = values_of(tuned), values_of(same)
    before = set(map(id, lora_fx.parameters(tuned)))
    for model, seed in ((tuned, 5 + dist.get_rank()), (same, 5)):
        _grow(model, seed, folder)
    result["grown"] = values_of(tuned), values_of(same)
    result["kept"] = before <= set(map(id, tuned.parameters())), _told(tuned) == told
    result["held"] = _in_groups(tuned), len(list(tuned.parameters()))  # what was dropped is in no group
    handle.remove()
    result["hooks"] = len([hook for hook in tuned._forward_hooks.values() if hook.__module__ == __name__])
    for model in (tuned, same):
        lora_fx.use(model, {"default": 1, "b": 0.5, "d": 0.5})
    optimizer.add_param_group({"params": list(lora_fx.parameters(tuned, adapter="b"))})
    _step(tuned, optimizer, 1)
    tuned.zero_grad()  # the optimizer does not know `d`
    trained = values_of(tuned)
    lora_fx.load_adapter_state(same, {name: trained[name] for name in lora_fx.adapter_state(same)})
    lora_fx.load_adapter_state(tuned, lora_fx.adapter_state(same))
    result["state"] = values_of(tuned), trained
    result["losses"] = steps_of(tuned, tokens, 20, together=False), steps_of(same, tokens, 20, together=True)
    after = values_of(same)
    result["after"] = [(value, after[name]) for name, value in values_of(tuned).items()]
    result["hits"] = sum(region.hits for region in lora_fx.inspect(tuned).regions)
    return result | all_of(tuned, alike(same, values_of(tuned)), folder / "grown")


def _tail_together(model: Any) -> Any:
    """Shard a model with one group for the last two modules, as accelerate's FSDP2 does."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard([model.norm, model.head], reshard_after_forward=False)
    return fully_shard(model)


def _grow(model: nn.Module, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    lora_fx.add(model, MORE, adapter="b")
    lora_fx.add(model, folder / "saved", adapter="c", rank=5)
    lora_fx.combine(model, {"default": 0.5, "c": 2.0}, adapter="d", method="cat")
    lora_fx.combine(model, {"default": 0.5, "c": 2.0}, adapter="e", method="svd", r=4)
    lora_fx.swap(model, lora_fx.adapter_state(model, "default"), adapter="c")
    lora_fx.swap(model, folder / "saved", adapter="default")
    lora_fx.rename(model, "e", "f")
    lora_fx.combine(model, ["default", "f"], adapter="g", method="svd", r=2)
    lora_fx.drop(model, "f")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(tokens(seed)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _tell(model: Any) -> Any:
    """Tell groups what `fully_shard` is not told."""
    model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1]])
    model.blocks[0].set_gradient_divide_factor(float(dist.get_world_size()))
    return _told(model)


def _in_groups(model: Any) -> int:
    states = {id(state): state for module in model.modules() if (state := getattr(module, "_get_fsdp_state", dict)())}
    return sum(len(group.fsdp_params) for state in states.values() for group in state._fsdp_param_groups)


def _told(model: Any) -> Any:
    states = [block._get_fsdp_state() for block in model.blocks]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return states[0]._states_to_forward_prefetch == states[1:], [group.gradient_divide_factor for group in groups]
