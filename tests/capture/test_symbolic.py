"""Tracing without inputs: straight-line code only; whatever a Proxy could get wrong in silence is refused."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.capture.captured import NotCaptured
from lora_fx.capture.symbolic import capture_symbolically
from lora_fx.regions.program import make_program
from tests.support import zoo
from tests.support.zoo import rules


class Straight(nn.Module):
    """Made with the forward under test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.scale, self.inner = 2.0, zoo.Mlp(8)


def module(forward) -> nn.Module:
    return type("Straight", (Straight,), {"forward": forward})()


def helper(x):
    return x * 2


def branching_helper(x):
    return x if x is None else x * 2


FACTOR = 3

SAFE = {
    "linear": lambda self, x: self.second(F.gelu(self.first(x))),
    "residual": lambda self, x: x + self.inner(x) * self.scale / FACTOR,
    "shapes": lambda self, x: self.first(x).view(x.size(0), -1).view(x.shape[0], x.shape[1], -1),
    "dropout module": lambda self, x: self.drop(self.first(x)),
    "weight": lambda self, x: F.linear(x, self.first.weight, self.first.bias) @ self.second.weight,
    "helper": lambda self, x: helper(self.first(x)),
    "math": lambda self, x: self.first(x) * math.sqrt(2),
    "two inputs": lambda self, x, y: self.first(x) + y,
}


@pytest.mark.parametrize("name", SAFE)
def test_straight_line_code_is_traced_and_right_for_any_input(name):
    safe = module(SAFE[name]).eval()
    program = make_program(capture_symbolically(safe), safe)
    count = 2 if name == "two inputs" else 1
    for batch, length in ((2, 3), (1, 1), (5, 9)):
        inputs = tuple(zoo.features(batch, length, 8) for _ in range(count))
        if count == 2:
            inputs = (inputs[0], inputs[1].clone())
        assert isinstance(program.guard.match(safe, inputs, {}), tuple)
        assert torch.equal(program.function(safe, *inputs), safe(*inputs))


def none_default(self, x, mask=None):
    return self.first(x) if mask is None else x


def keyword_rest(self, x, **kwargs):
    return self.first(x)


def branch(self, x):
    return self.first(x) if x.shape[1] > 3 else x


def loop(self, x):
    for _ in range(2):
        x = self.first(x)
    return x


def swallow(self, x):
    try:
        return self.first(x)
    except Exception:
        return x


def context(self, x):
    with torch.no_grad():
        y = self.second(x)
    return self.first(x) + y


def writes(self, x):
    self.seen = 1
    return self.first(x)


def unpacks(self, x):
    b, t, c = x.shape
    return self.first(x).view(b, t, c)


UNSAFE = {
    "optional argument": (none_default, "parameter mask of the forward is optional"),
    "keywords": (keyword_rest, "parameter kwargs of the forward is optional"),
    "branch": (branch, "branch, loop, comparison or unpacking"),
    "loop": (loop, "uses range"),
    "try": (swallow, "with, try or generator"),
    "with": (context, "with, try or generator"),
    "state": (writes, "stores into an object"),
    "unpacking": (unpacks, "branch, loop, comparison or unpacking"),
    "isinstance": (lambda self, x: self.first(x) * isinstance(x, torch.Tensor), "uses isinstance"),
    "hasattr": (lambda self, x: self.first(x) * hasattr(x, "shape"), "uses hasattr"),
    "is None": (lambda self, x: self.first(x) * (x is None), "branch, loop, comparison or unpacking"),
    "random": (lambda self, x: self.first(x) * random.random(), "uses random"),
    "time": (lambda self, x: self.first(x) * time.time(), "uses time"),
    "drawn constant": (lambda self, x: self.first(x) * torch.rand(()).item(), "calls rand on no input"),
    "training flag": (
        lambda self, x: F.dropout(self.first(x), 0.5, self.training),
        "train and eval mode give different graphs",
    ),
    "helper with a branch": (lambda self, x: branching_helper(self.first(x)), "branching_helper"),
    "missing attribute": (lambda self, x: self.first(x) * getattr(self, "nothing", 1), "uses getattr"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_a_proxy_could_get_wrong_is_refused_with_the_reason(name):
    forward, reason = UNSAFE[name]
    with pytest.raises(NotCaptured) as caught:
        capture_symbolically(module(forward))
    assert reason in str(caught.value)


def test_untraceable_model_is_adapted_by_modules_and_the_plan_says_so():
    plan = lora_fx.plan(zoo.Gpt(), rules("**.c_attn"))
    assert {site.backend for site in plan.adapted} == {"module"}
    assert "branch, loop, comparison or unpacking" in plan.adapted[0].backend_reason
    assert "with inputs more of them would be" in str(plan)


def test_graph_traced_without_inputs_is_proven_on_the_first_call():
    model = zoo.Mixer().eval()
    tuned = lora_fx.apply(model, rules("**", init="random"))
    modules = lora_fx.apply(model, rules("**"), backend="modules")
    modules.load_state_dict(tuned.state_dict())
    x = zoo.features(3, 6)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(tuned(x), modules(x))
    first, second = lora_fx.inspect(tuned).regions
    assert (first.hits, first.misses) == (2, {"not compared with the forward yet": 1})
    assert (second.hits, second.misses) == (3, {}), "the blocks are alike and share the graph"


def test_changed_attribute_is_guarded_without_inputs_too():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(8, 8), 2.0

        def forward(self, x):
            return self.fc(x) * self.scale

    model = nn.Sequential(Scaled(), Scaled()).eval()
    tuned = lora_fx.apply(model, rules("**"))
    x = zoo.features(2, 3, 8)
    with torch.no_grad():
        tuned(x)
        model[0].scale = tuned[0].scale = 5.0
        assert torch.equal(tuned(x), model(x))
