"""What faults are tried on: each public function that makes a model of one, or changes one in place, with a tiny model."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import lora_fx
from lora_fx import passes
from lora_fx.regions.known import KNOWN
from tests.support.faults import FAULTS, ends_at, ends_at_edit, lines, portrait, surroundings
from tests.support.zoo import Gpt, Mlp, features, tokens

Work = Callable[[nn.Module], object]
INPUTS = (tokens(2, 5),)


def written(name: str, **more: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"name": name}, "lora": {"r": 2, "init": "random"}}], **more}


@functools.cache
def adapted() -> nn.Module:
    """Return a model with graphs and three adapters, of which one trains norms; always the same, of which copies serve."""
    torch.manual_seed(0)
    tuned = lora_fx.apply(Gpt(16, 2), written("**.c_attn"), INPUTS)
    lora_fx.add(tuned, written("**.c_*", train=["**.ln_1"]), adapter="b")
    lora_fx.add(tuned, written("**.c_*"), adapter="plain")
    return tuned.eval()


def graph_module() -> nn.Module:
    """Return a GraphModule that is adapted node by node."""
    torch.manual_seed(0)
    return lora_fx.apply(fx.symbolic_trace(Mlp()), written("fc*"), (features(2, 3),)).eval()


@dataclass(slots=True)
class Figures:
    """What came of some faults."""

    tried: int = 0
    went_on: int = 0
    """The fault was met by something that is tried and given up where it fails, or never met."""
    changed: list[str] = field(default_factory=list)
    """Where a fault left the model or the process another one."""


def cases(folder: Path) -> dict[str, tuple[Callable[[], nn.Module], Work]]:
    """Return (the model, what is done with it) by name; files that are read are written first."""
    tuned = copy.deepcopy(adapted())
    lora_fx.save(tuned, folder / "saved", adapter="plain")
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.mul_(2)
    lora_fx.save(tuned, folder / "other", adapter="plain")
    state = {name: tensor.clone() for name, tensor in lora_fx.adapter_state(tuned).items()}

    def base() -> nn.Module:
        torch.manual_seed(0)
        return Gpt(16, 2)

    def fresh_apply(model: nn.Module) -> nn.Module:
        KNOWN.clear()
        return lora_fx.apply(model, written("**"), INPUTS)

    return {
        "plan": (base, lambda model: lora_fx.plan(model, written("**"), INPUTS)),
        "apply": (base, fresh_apply),
        "load": (base, lambda model: lora_fx.load(model, folder / "saved", INPUTS)),
        "add, rules": (adapted, lambda tuned: lora_fx.add(tuned, written("**.c_*", train=["**.ln_2"]), adapter="c")),
        "add, a file": (adapted, lambda tuned: lora_fx.add(tuned, folder / "saved", adapter="c")),
        "drop": (adapted, lambda tuned: lora_fx.drop(tuned, "b")),
        "rename": (adapted, lambda tuned: lora_fx.rename(tuned, "b", "c")),
        "combine": (adapted, lambda tuned: lora_fx.combine(tuned, ["default", "plain"], adapter="c")),
        "swap": (adapted, lambda tuned: lora_fx.swap(tuned, folder / "other", adapter="plain")),
        "load_adapter_state": (adapted, lambda tuned: lora_fx.load_adapter_state(tuned, state)),
        "save": (adapted, lambda tuned: lora_fx.save(tuned, folder / "again")),
        "merge": (adapted, lambda tuned: lora_fx.merge(tuned, adapters="plain")),
        "remove": (adapted, lora_fx.remove),
        "export": (adapted, lambda tuned: lora_fx.export(tuned, folder / "merged", "merged")),
        "a call": (adapted, lambda tuned: tuned(tokens(3, 7))),
        "GraphModule: apply": (_traced, lambda model: lora_fx.apply(model, written("fc*"), (features(2, 3),))),
        "GraphModule: merge": (graph_module, lora_fx.merge),
        "GraphModule: add": (graph_module, lambda tuned: lora_fx.add(tuned, written("fc1"), adapter="b")),
    }


def _traced() -> nn.Module:
    torch.manual_seed(0)
    return fx.symbolic_trace(Mlp())


EDITING: dict[str, tuple[Callable[[], nn.Module], Work]] = {
    "apply": (_traced, lambda model: lora_fx.apply(model, written("fc*"), (features(2, 3),))),
    "merge": (graph_module, lora_fx.merge),
    "remove": (graph_module, lora_fx.remove),
    "ask (add)": (graph_module, lambda tuned: lora_fx.add(tuned, written("fc1"), adapter="b")),
    "passes.run": (graph_module, lambda tuned: passes.run(tuned, [passes.Merge()])),  # type: ignore[arg-type]
    "remerge": (graph_module, lora_fx.remerge),
}
"""What edits the graph of a GraphModule, or of a copy of it."""


def at_lines(make: Callable[[], nn.Module], work: Work, number: int, seed: int = 0) -> Figures:
    """Return what comes of faults at so many lines, spread over all that the work runs."""
    work(copy.deepcopy(make()))  # what is made once in a process is there then
    model, figures, chance = make(), Figures(), random.Random(seed)
    total = min(lines(lambda: work(copy.deepcopy(model))) for _ in range(2))  # later runs know more
    for n, line in enumerate(sorted(chance.sample(range(1, total + 1), min(number, total)))):
        one, fault = copy.deepcopy(model), FAULTS[n % len(FAULTS)]
        before = _all_of(one)
        met = ends_at(line, lambda one=one: work(one), fault)  # type: ignore[misc]
        figures.tried += 1
        figures.went_on += not met.ended
        if met.ended and _all_of(one) != before:
            figures.changed.append(f"{fault.__name__} at {met.place}")
        if met.place and not met.ended and fault is KeyboardInterrupt:
            figures.changed.append(f"{fault.__name__} at {met.place} is swallowed")
    return figures


def at_edits(make: Callable[[], nn.Module], work: Work) -> Figures:
    """Return what comes of a fault behind each edit of a graph."""
    figures, model = Figures(), make()
    while True:
        one, fault = copy.deepcopy(model), FAULTS[figures.tried % len(FAULTS)]
        before = _all_of(one)
        if not ends_at_edit(figures.tried, lambda one=one: work(one), fault):  # type: ignore[misc]
            return figures
        if _all_of(one) != before:
            figures.changed.append(f"{fault.__name__} after edit {figures.tried}")
        figures.tried += 1


def _all_of(model: nn.Module) -> object:
    return portrait(model), surroundings(), _output(model)


def _output(model: nn.Module) -> bytes:
    """Return the bits that a model computes; a call of it is counted, so a copy is called."""
    inputs = INPUTS if isinstance(model, Gpt) else (features(2, 3),)
    with torch.no_grad():
        output: Tensor = copy.deepcopy(model)(*inputs)
    return output.numpy().tobytes()
