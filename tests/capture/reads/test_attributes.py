"""What a forward reads of its module, attributes of every kind, is guarded or refused by name."""

from __future__ import annotations

import functools
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_fx.capture.captured import NotCaptured
from tests.support.capturing import Block, Colour, captured, put, refusal, told_after, x


class Config:
    def __init__(self, **settings) -> None:
        vars(self).update(settings)


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


@pytest.mark.parametrize(
    "late",
    [lambda self: object.__getattribute__(self, "number") > 1, lambda self: self.__getstate__()["number"] > 1],
    ids=["__getattribute__", "__getstate__"],
)
def test_attributes_that_are_read_unheard_are_refused(late):
    assert "the forward reads attributes by __get" in refusal(lambda self, x: x + late(self), number=2)
