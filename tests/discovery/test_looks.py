"""`apply` after `plan` does not look at the model again; whatever has changed in between, it does."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.discovery import study
from lora_fx.discovery.looks import LOOKS
from lora_fx.models.samples import samples_for
from lora_fx.regions import learning
from lora_fx.regions.checking import Replay
from lora_fx.regions.install import regions
from tests.support.countedcalls import counted_calls
from tests.support.zoo import features, rules

pytestmark = pytest.mark.filterwarnings("ignore::lora_fx.LoraFxWarning")

SCALE = 2.0
SWITCHES = {"on": True}


def scaled(x: Tensor) -> Tensor:
    return SCALE * x


class Settings:
    def __init__(self) -> None:
        self.factor, self.names, self.inner = 3.0, ["a", "b"], {"deep": [1.0]}


class Layer(nn.Module):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.settings, self.flag, self.after = Settings(), False, torch.tanh
        self.register_buffer("shift", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.fc2(self.act(self.fc1(x)))) * self.settings.factor + self.shift * self.factor
        return x - y if self.flag else x + scaled(y)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.unused(x) if SWITCHES["on"] and os.environ.get("LAYERS_UNUSED") else x


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often models are watched and surveyed, graphs captured and compared."""
    looks = [(study, "weight_uses"), (study, "survey"), (learning, "capture"), (Replay, "difference")]
    return counted_calls(monkeypatch, looks)


def made() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def known(tuned: nn.Module) -> list[tuple[object, ...]]:
    """What each region knows, and where it came from."""
    return [
        (path, [(str(p.graph), sorted(map(sorted, p.ones)), p.guard.proven) for p in region.block.programs])
        for path, _, region in regions(tuned)
    ]


def test_apply_after_plan_only_proves_what_is_adapted(counts: Counter[str]):
    x, rule = features(2, 6), rules("blocks.**")
    at_once = made()
    lora_fx.apply(at_once, rule, (x,))
    whole = counts["difference"]
    LOOKS.clear()
    counts.clear()

    model = made()
    plan = lora_fx.plan(model, rule, (x,))
    planned = counts["difference"]
    by_plan = lora_fx.apply(model, plan)
    proven = counts["difference"] - planned
    assert (counts["weight_uses"], counts["survey"], planned + proven) == (1, 1, whole)

    counts.clear()
    tuned = lora_fx.apply(model, rule, (x,))
    assert (counts["weight_uses"], counts["survey"], counts["capture"], counts["difference"]) == (0, 0, 0, proven)
    assert known(tuned) == known(by_plan)
    assert lora_fx.plan(model, rule, (x,)) == plan
    LOOKS.clear()
    assert known(lora_fx.apply(model, rule, (x,))) == known(tuned)
    with torch.no_grad():
        assert torch.equal(tuned(x), model(x))


def test_other_rules_need_no_second_run_and_the_same_sites_no_second_survey(counts: Counter[str]):
    model, x = made(), features(2, 6)
    first = lora_fx.plan(model, example_inputs=(x,), target="blocks.**", r=4)
    again = lora_fx.plan(model, example_inputs=(x,), target="blocks.**", r=8)
    assert (counts["weight_uses"], counts["survey"]) == (1, 1)
    assert [site.lora.r for site in again.adapted if site.lora] == [8] * 6
    assert again.regions == first.regions
    fewer = lora_fx.plan(model, example_inputs=(x,), target="fc1", r=8)
    assert (counts["weight_uses"], counts["survey"]) == (1, 2)
    LOOKS.clear()
    assert lora_fx.plan(model, example_inputs=(x,), target="fc1", r=8) == fewer


def _swap_forward(model: Layers, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Layer, x: Tensor) -> Tensor:
        return x - self.fc2(self.fc1(x))

    patch.setattr(Layer, "forward", forward)


def _grown(model: Layers) -> None:
    model.blocks.append(Layer())


def _in_place(model: Layers) -> None:
    with torch.no_grad():
        model.blocks[0].fc1.weight.add_(1)


Change = Callable[[Layers, pytest.MonkeyPatch], object]
CHANGES: dict[str, Change] = {
    "training mode": lambda m, p: m.train(),
    "a parameter in place": lambda m, p: _in_place(m),
    "a parameter's data": lambda m, p: m.blocks[0].fc1.weight.data.add_(1),
    "another parameter": lambda m, p: setattr(m.blocks[0].fc1, "weight", nn.Parameter(m.blocks[0].fc1.weight.clone())),
    "requires_grad": lambda m, p: m.blocks[0].fc1.weight.requires_grad_(False),
    "dtype": lambda m, p: m.double(),
    "a buffer": lambda m, p: m.blocks[1].shift.mul_(2),
    "an attribute": lambda m, p: setattr(m.blocks[2], "flag", True),
    "a new attribute": lambda m, p: setattr(m, "note", "new"),
    "a function": lambda m, p: setattr(m.blocks[0], "after", torch.sin),
    "an object's attribute": lambda m, p: setattr(m.blocks[0].settings, "factor", 4.0),
    "deep in an object": lambda m, p: m.blocks[0].settings.inner["deep"].append(2.0),
    "a module replaced": lambda m, p: setattr(m.blocks[0], "act", nn.GELU()),
    "a module added": lambda m, p: _grown(m),
    "a hook": lambda m, p: m.blocks[0].register_forward_hook(lambda *_: None),
    "a forward of its own": lambda m, p: setattr(m.blocks[0], "forward", m.blocks[1].forward),
    "another class": lambda m, p: setattr(m.blocks[0].act, "__class__", nn.ReLU),
    "the class's forward": _swap_forward,
    "a class attribute": lambda m, p: p.setattr(Layer, "factor", 2.0),
    "torch's forward": lambda m, p: p.setattr(nn.GELU, "forward", nn.ReLU.forward),
    "a global": lambda m, p: p.setitem(globals(), "SCALE", 5.0),
    "a global function": lambda m, p: p.setitem(globals(), "scaled", lambda x: x),
    "in a global dict": lambda m, p: p.setitem(SWITCHES, "on", False),
    "the environment": lambda m, p: p.setenv("LAYERS_UNUSED", "1"),
    "default dtype": lambda m, p: torch.set_default_dtype(torch.float64),
    "a switch of torch": lambda m, p: torch.backends.mkldnn.set_flags(False),
}


def test_every_change_is_seen_and_none_is_not(monkeypatch: pytest.MonkeyPatch):
    x = features(2, 6)
    unseen = []
    for name, change in CHANGES.items():
        model = made()
        before = LOOKS.state(model, samples_for(model, (x,)))
        unchanged = LOOKS.state(model, samples_for(model, (x,)))
        assert before is not None, name
        assert unchanged is not None, name
        assert before.still(unchanged), name
        with monkeypatch.context() as patch:
            mkldnn = torch.backends.mkldnn.enabled
            try:
                change(model, patch)
                now = LOOKS.state(model, samples_for(model, (x,)))
            finally:
                torch.set_default_dtype(torch.float32)
                torch.backends.mkldnn.set_flags(mkldnn)
        if now is not None and before.still(now):
            unseen.append(name)
    assert unseen == []


def test_other_inputs_and_inputs_that_were_written_to_are_others(counts: Counter[str]):
    model, x = made(), features(2, 6)
    lora_fx.plan(model, rules("blocks.**"), (x,))
    for given in ((x.clone(),), (x.add_(1),), {"x": x}, [(x,), (features(3, 4),)]):
        counts.clear()
        lora_fx.plan(model, rules("blocks.**"), given)
        assert counts["survey"] == 1


@pytest.mark.parametrize("name", ["the environment", "an object's attribute", "a module added", "the class's forward"])
def test_plan_after_a_change_is_that_of_the_changed_model(name: str, monkeypatch: pytest.MonkeyPatch):
    model, x = made(), features(2, 6)
    before = lora_fx.plan(model, rules("**"), (x,))
    CHANGES[name](model, monkeypatch)
    after = lora_fx.plan(model, rules("**"), (x,))
    tuned = lora_fx.apply(model, rules("**"), (x,))
    LOOKS.clear()
    assert after == lora_fx.plan(model, rules("**"), (x,))
    if name in ("the environment", "a module added"):
        assert after != before
    with torch.no_grad():
        assert torch.equal(tuned(x), model(x))


class Seeing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Handle:
    """What its slots hold shows, what a library's object holds does not."""

    __slots__ = ("__weakref__", "held")

    def __init__(self, held: object) -> None:
        self.held = held


def test_what_cannot_be_compared_is_looked_at_again():
    model, x = made(), features(2, 6)
    tried = samples_for(model, (x,))
    for mode in (Seeing(), Dispatching(), torch.inference_mode()):
        with mode:
            assert LOOKS.state(model, tried) is None
    assert LOOKS.state(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 16))), tried) is None
    handle = model.handle = Handle(1)
    before = LOOKS.state(model, tried)
    handle.held = 2
    now = LOOKS.state(model, tried)
    assert before is not None
    assert now is not None
    assert not before.still(now)
    for opaque in (iter([1]), memoryview(b"1"), weakref.ref(model), {(1,): {object()}}):
        handle.held = opaque
        assert LOOKS.state(model, tried) is None, opaque


def test_nothing_that_is_known_keeps_a_model_its_inputs_or_a_plan():
    model, x = made(), features(2, 6)
    plan = lora_fx.plan(model, rules("blocks.**"), (x,))
    assert len(LOOKS) == 1
    assert copy.deepcopy(plan) == plan
    assert lora_fx.Plan.from_json(plan.to_json()) == plan
    gone = [weakref.ref(part) for part in (model, model.blocks[0], model.blocks[0].fc1.weight, x)]
    del model, x, plan
    gc.collect()
    assert [one() for one in gone] == [None] * 4
    assert len(LOOKS) == 0


def test_of_a_few_models_only_and_none_if_asked():
    models, x = [made() for _ in range(10)], features(2, 6)
    for model in models:
        lora_fx.plan(model, rules("blocks.**"), (x,))
    assert len(LOOKS) == 8
    LOOKS.limit(0)
    try:
        assert len(LOOKS) == 0
        lora_fx.plan(models[0], rules("blocks.**"), (x,))
        assert len(LOOKS) == 0
    finally:
        LOOKS.limit(8)


def test_models_of_transformers_are_known_again(counts: Counter[str]):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=50)
    ).eval()
    model = pickle.loads(pickle.dumps(model))
    for inputs in ({"input_ids": torch.arange(6).view(1, 6)}, None):
        counts.clear()
        lora_fx.plan(model, "all-linear", inputs)
        lora_fx.apply(model, "all-linear", inputs)
        assert (counts["weight_uses"], counts["survey"]) == (1, 1)
