"""Guards on what lies around the arguments: attributes of every kind, structure, globals, closures, flags."""

from __future__ import annotations

import enum
import functools
import math
import os
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.capture.calls.arguments import flatten
from lora_fx.capture.captured import NotCaptured, capture, refuse_opaque
from tests.capture.test_capture import Block, captured, reason, refusal, x

SCALE = 2.0
SCALES = [2.0]
COUNTS = {"calls": 0}
GENERATOR = random.Random(0)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Config:
    def __init__(self, **settings) -> None:
        vars(self).update(settings)


def told_after(module: nn.Module, change) -> str | None:
    """Return why a graph of the module does not fit any more after a change; before it, it fits."""
    found = captured(module, x())
    with torch.no_grad():
        assert reason(module, found, x()) is None
        change()
        return reason(module, found, x())


def put(module: object, name: str, value: object):
    return lambda: setattr(module, name, value)


@pytest.mark.parametrize(
    ("forward", "before", "after"),
    [
        (lambda self, x: self.held(self.first(x)), torch.tanh, F.relu),
        (lambda self, x: self.held(self.first(x)), functools.partial(F.elu, alpha=1.0), functools.partial(F.elu, alpha=2.0)),
        (lambda self, x: self.first(x) if self.held is Colour.RED else x, Colour.RED, Colour.BLUE),
        (lambda self, x: self.first(x) * len(self.held.__name__), Config, Colour),
        (lambda self, x: self.first(x) * self.held["a"], {"a": 1}, {"a": 1.0}),
        (lambda self, x: self.first(x) * self.held[1], [None, 2], [None, 3]),
        (lambda self, x: self.first(x) if "a" in self.held else x, {"a"}, {"b"}),
        (lambda self, x: self.first(x) * self.held.scale, SimpleNamespace(scale=2.0), SimpleNamespace(scale=3.0)),
        (lambda self, x: self.first(x) * self.held.text.scale, Config(text=Config(scale=2)), Config(text=Config(scale=3))),
        (lambda self, x: self.first(x) * self.held["a"][0].scale, {"a": [Config(scale=2)]}, {"a": [Config(scale=3)]}),
    ],
    ids=["function", "partial", "enum", "class", "dict", "list", "set", "namespace", "nested", "deep"],
)  # fmt: skip
def test_attribute_of_any_kind_is_guarded(forward, before, after):
    module = Block(forward, held=before)
    told = told_after(module, put(module, "held", after))
    assert told is not None
    assert told.startswith("value of held")


def test_container_changed_in_place_is_seen():
    module = Block(lambda self, x: self.first(x) * self.scales[0], scales=[2.0])
    assert told_after(module, lambda: module.scales.append(3.0)) == "value of scales"


def test_attribute_of_a_configuration_that_appears_later_is_seen():
    module = Block(lambda self, x: self.first(x) * getattr(self.config, "gain", 1), config=Config())
    assert told_after(module, put(module.config, "gain", 2)) == "config.gain now exists"


@pytest.mark.parametrize(
    ("held", "kind"),
    [(random.Random(0), "Random"), (np.ones(8), "ndarray"), (threading.Lock(), "lock")],
    ids=["generator", "array", "lock"],
)
def test_attribute_that_cannot_be_compared_is_refused_by_name(held, kind):
    module = Block(lambda self, x: self.first(x) if self.held is not None else x)
    module.__dict__["held"] = held
    with pytest.raises(NotCaptured, match=f"the forward reads held, of type {kind}|cannot pickle"):
        captured(module, x())


def test_attribute_that_a_class_looks_up_in_its_configuration_is_guarded():
    class Configured(Block):
        def __getattr__(self, name):
            if "config" in self.__dict__ and name in self.__dict__["config"]:
                return self.__dict__["config"][name]
            return super().__getattr__(name)

    module = Configured(lambda self, x: self.first(x) * self.gain, config={"gain": 2})
    assert told_after(module, lambda: module.config.update(gain=3)) == "value of gain"


def counts_in_dict(self, x):
    self.counts["calls"] += 1
    return self.first(x)


def remembers(self, x):
    self.seen.append(1)
    return self.first(x)


def tells(self, x):
    self.observer.inner.largest = 3.0
    return self.first(x)


@pytest.mark.parametrize(
    ("forward", "parts", "told"),
    [
        (counts_in_dict, {"counts": {"calls": 0}}, "the forward writes counts to the module"),
        (remembers, {"seen": []}, "the forward writes seen to the module"),
        (tells, {"observer": Config(inner=SimpleNamespace(largest=0.0))}, "the forward writes observer to the module"),
    ],
)
def test_write_to_what_the_module_holds_is_refused_and_leaves_it_as_it_is(forward, parts, told):
    module = Block(forward, **parts)
    with pytest.raises(NotCaptured, match=told):
        captured(module, x())
    assert repr(parts) == repr({name: vars(module)[name] for name in parts})


def test_adding_to_a_buffer_in_place_is_no_write_of_an_attribute():
    def forward(self, x):
        self.steps += 1
        return self.first(x) / self.steps

    module = Block(forward)
    module.register_buffer("steps", torch.zeros((), dtype=torch.long))
    assert captured(module, x()).dependencies.retreats == {}
    assert module.steps == 0


# -- what lies outside


def scaled(value, factor=2.0):
    return value * SCALE * factor


def test_global_of_a_function_that_the_forward_calls_is_guarded(monkeypatch):
    module = Block(lambda self, x: scaled(self.first(x)))
    told = told_after(module, lambda: monkeypatch.setitem(globals(), "SCALE", 3.0))
    assert told == "value of SCALE"


def test_global_list_changed_in_place_is_seen(monkeypatch):
    monkeypatch.setitem(globals(), "SCALES", [2.0])
    module = Block(lambda self, x: self.first(x) * SCALES[0])
    assert told_after(module, lambda: SCALES.append(1.0)) == "value of SCALES"


def test_function_that_is_replaced_is_seen(monkeypatch):
    module = Block(lambda self, x: scaled(self.first(x)))
    assert told_after(module, lambda: monkeypatch.setitem(globals(), "scaled", torch.tanh)) == "value of scaled"


def test_default_argument_that_is_replaced_is_seen(monkeypatch):
    module = Block(lambda self, x: scaled(self.first(x)))
    told = told_after(module, lambda: monkeypatch.setattr(scaled, "__defaults__", (3.0,)))
    assert told == "value of the defaults of scaled"


def test_variable_of_a_closure_is_guarded():
    factor = 2.0

    def change():
        nonlocal factor
        factor = 3.0

    module = Block(lambda self, x: self.first(x) * factor)
    told = told_after(module, change)
    assert told is not None
    assert told.endswith("factor")


def test_environment_is_guarded(monkeypatch):
    monkeypatch.setenv("LORA_FX_TEST", "1")
    module = Block(lambda self, x: self.first(x) * float(os.environ.get("LORA_FX_TEST", "2")))
    assert told_after(module, lambda: monkeypatch.setenv("LORA_FX_TEST", "3")) == "value of $LORA_FX_TEST"


def test_question_to_torch_is_asked_again_at_each_call():
    module = Block(lambda self, x: self.first(x) if torch.are_deterministic_algorithms_enabled() else x)
    try:
        told = told_after(module, lambda: torch.use_deterministic_algorithms(True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == "value of are_deterministic_algorithms_enabled()"


def test_flag_of_a_backend_is_guarded(monkeypatch):
    module = Block(lambda self, x: self.first(x) if torch.backends.cuda.matmul.allow_tf32 else x)
    flag = torch.backends.cuda.matmul.allow_tf32
    try:
        told = told_after(module, put(torch.backends.cuda.matmul, "allow_tf32", not flag))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = flag
    assert told == "value of torch.backends.cuda.matmul.allow_tf32"


def counts_outside(self, x):
    COUNTS["calls"] += 1
    return self.first(x)


def test_write_to_a_global_is_refused_and_put_back():
    assert refusal(counts_outside) == "the forward changes COUNTS"
    assert COUNTS == {"calls": 0}


def test_clock_generators_and_inference_mode_are_refused():
    def inference(self, x):
        with torch.inference_mode():
            scale = x.max() + 1
        return self.first(x) / scale.clone()

    assert refusal(lambda self, x: self.first(x) * time.time()) == "the forward reads the clock (time)"
    assert refusal(lambda self, x: self.first(x) * GENERATOR.random()) == "the forward reads GENERATOR, of type Random"
    assert refusal(inference) == "the forward switches to inference mode"


def test_random_state_of_python_and_numpy_is_put_back_when_a_forward_is_refused():
    before, numpys = random.getstate(), np.random.get_state()[2]
    assert refusal(lambda self, x: self.first(x) * random.random()) == "the forward draws from Python's random"
    assert refusal(lambda self, x: self.first(x) * np.random.rand()) == "the forward draws from numpy's random"
    assert random.getstate() == before
    assert np.random.get_state()[2] == numpys


def test_numbers_of_a_library_need_no_mention_but_are_right():
    module = Block(lambda self, x: self.first(x) * math.pi)
    assert captured(module, x()).dependencies.retreats == {}


# -- structure


def test_second_name_of_a_submodule_is_guarded():
    module = Block(lambda self, x: self.third(self.first(x)))
    module.third = module.second
    assert told_after(module, put(module, "third", nn.Linear(8, 8))) == "third is no longer second"


def test_list_that_grows_is_seen():
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    module = Block(forward, layers=nn.ModuleList([nn.Tanh()]))
    assert told_after(module, lambda: module.layers.append(nn.ReLU())) == "children of layers"


class Finishes(Block):
    def finish(self, value):
        return torch.tanh(value)


def test_method_or_forward_that_the_instance_hides_is_seen():
    module = Finishes(lambda self, x: self.finish(self.first(x)))
    assert told_after(module, put(module, "finish", torch.sigmoid)) == "finish is replaced"
    outer = Block(lambda self, x: self.inner(x), inner=Finishes(lambda self, x: self.first(x)))
    assert told_after(outer, put(outer.inner, "forward", torch.sigmoid)) == "forward of inner is replaced"


def test_parameter_that_has_become_none_or_has_gone_is_a_miss():
    module = Block(lambda self, x: self.first(x) * self.gain, gain=nn.Parameter(torch.ones(8)))
    assert told_after(module, put(module, "gain", None)) is not None
    module = Block(lambda self, x: self.first(x) * self.shift, shift=torch.ones(8))
    assert told_after(module, lambda: delattr(module, "shift")) is not None


# -- arguments


def test_arguments_that_cannot_be_copied_are_told_before_anybody_copies_them():
    for argument in ((each for each in ()), threading.Lock(), lambda value: value):
        with pytest.raises(NotCaptured, match="argument argument 1 is of type"):
            refuse_opaque(flatten((x(), argument), {}))
    refuse_opaque(flatten((x(), {"scale": 2}, Colour.RED, torch.tanh), {"flag": None}))


def test_enum_and_function_arguments_are_guarded_by_identity():
    module = Block(lambda self, x, finish, colour: finish(self.first(x)) if colour is Colour.RED else x)
    found = capture(module, (x(), torch.tanh, Colour.RED), {})
    assert reason(module, found, x(), torch.tanh, Colour.RED) is None
    assert reason(module, found, x(), torch.sigmoid, Colour.RED) == "argument 1 is another object"
    assert reason(module, found, x(), torch.tanh, Colour.BLUE) == "argument 2 is another object"


class Kind(enum.StrEnum):
    PLAIN = "plain"
    WIDE = "wide"


KNOWN_KINDS = {Kind.PLAIN: {"x"}, Kind.WIDE: {"x", "y"}}


def test_dict_with_members_of_an_enum_as_keys_is_guarded(monkeypatch):
    class Registered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x):
            return self.first(x) * len(KNOWN_KINDS[Kind.WIDE])

    model = Registered().eval()
    x = torch.ones(2, 3, 8)
    tuned = lora_fx.apply(model, {"version": 1, "rules": [{"match": {"name": "first"}, "lora": {"r": 2}}]}, (x,))
    assert lora_fx.inspect(tuned).regions[0].graphs == 1
    monkeypatch.setitem(KNOWN_KINDS, Kind.WIDE, {"x", "y", "z"})
    with torch.no_grad():
        assert torch.equal(tuned(x), model(x))
