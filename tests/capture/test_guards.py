"""Guards: which calls fit a graph, and what those are told that do not."""

from __future__ import annotations

import enum
import threading

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.capture.calls.arguments import flatten
from lora_fx.capture.captured import NotCaptured, capture, refuse_opaque
from lora_fx.capture.guards import compile_guard
from tests.support import zoo
from tests.support.capturing import Block, Colour, captured, put, reason, told_after, x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.Mlp(8)
        self.scale = 2.0

    def forward(self, hidden, mask=None, flag=False, pair=None):
        hidden = self.inner(hidden) * self.scale
        hidden = hidden if mask is None else hidden * mask
        hidden = hidden + pair[0] if pair is not None else hidden
        return -hidden if flag else hidden


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((x(3, 9),), {}, None),
        ((x(), x()), {}, "number of positional arguments"),
        ((x(),), {"flag": False}, "keyword arguments"),
        ((x().double(),), {}, "dtype of hidden"),
        ((x()[0],), {}, "number of dimensions of hidden"),
        ((zoo.features(2, 5, 4),), {}, "size: hidden.shape[2] == 8"),
        ((x(1, 5),), {}, "size: 2 <= hidden.shape[0]"),
        ((None,), {}, "hidden is not a plain tensor"),
        (([x()],), {}, "hidden is not a plain tensor"),
        ((nn.Parameter(x()),), {}, None),
    ],
)
def test_call_that_does_not_fit_is_told_why(args, kwargs, expected):
    module = Layer()
    graph = captured(module, x())
    with torch.no_grad():
        assert reason(module, graph, *args, **kwargs) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"mask": x()}, {"mask": None}, "mask is not a plain tensor"),
        ({"flag": True}, {"flag": False}, "value of flag"),
        ({"flag": True}, {"flag": 1}, "value of flag"),
        ({"pair": (x(), 1)}, {"pair": (x(), 2)}, "value of pair[1]"),
        ({"pair": (x(), 1)}, {"pair": [x(), 1]}, "structure of pair"),
        ({"pair": (x(), 1)}, {"pair": (x(),)}, "structure of pair"),
        ({"pair": {0: x(), 1: 2}}, {"pair": {0: x(), 2: 2}}, "keys of pair"),
    ],
)
def test_constants_and_structure_are_guarded(first, second, expected):
    module = Layer()
    graph = captured(module, x(), **first)
    with torch.no_grad():
        assert reason(module, graph, x(), **first) is None
        assert reason(module, graph, x(), **second) == expected


def test_one_tensor_given_twice_is_another_call_than_two_tensors():
    module = Block(lambda self, a, b: self.first(a) if a is b else self.second(b))
    a, b = x(), x().clone()
    twice, once = captured(module, a, a), captured(module, a, b)
    with torch.no_grad():
        assert reason(module, twice, a, b) == "one tensor was given twice"
        assert reason(module, once, a, a) == "different tensors were given, now one twice"
        assert reason(module, once, a, b) is None


def test_grad_mode_is_guarded_only_where_the_forward_asks_for_it_or_changes_it():
    asks = Block(lambda self, x: self.first(x) if torch.is_grad_enabled() else self.second(x))
    with torch.no_grad():
        graph = captured(asks, x())
    assert reason(asks, graph, x()) == "grad mode"

    class Stops(Block):
        def forward(self, x):
            with torch.no_grad():
                y = self.second(x)
            return self.first(x) + y

    stops = Stops(lambda self, x: x)
    assert reason(stops, captured(stops, x()), x()) == "grad mode"
    careless = Block(lambda self, x: self.first(x))
    assert reason(careless, captured(careless, x()), x()) is None


def test_autocast_attributes_classes_and_hooks_are_guarded():
    module = Layer()
    graph = captured(module, x())
    classes = {path: type(module.get_submodule(path)) for path in graph.dependencies.inlined}
    guard = compile_guard(graph, classes)

    def told() -> str | None:
        result = guard.match(module, (x(),), {})
        return guard.reasons[result] if isinstance(result, int) else None

    with torch.no_grad():
        assert told() is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert told() == "autocast on cpu"
        module.scale = 3.0
        assert told() == "value of scale"
        module.scale = 2.0
        handle = module.inner.register_forward_hook(lambda *args: None)
        assert told() == "a hook on inner"
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert told() == "a global module hook"
        handle.remove()
        module.inner = type("Other", (zoo.Mlp,), {})(8)
        assert told() == "class of inner"


def test_layout_is_guarded_only_where_the_forward_asks_for_it():
    asks = Block(lambda self, x: self.first(x) if x.is_contiguous() else self.second(x))
    flipped = x(5, 2).transpose(0, 1)
    with torch.no_grad():
        assert reason(asks, captured(asks, x()), flipped) == "memory layout of argument 0"
        careless = Block(lambda self, x: self.first(x))
        assert reason(careless, captured(careless, x()), flipped) is None


def test_attribute_that_appears_later_is_guarded():
    module = Block(lambda self, x: self.first(x) * getattr(self, "gain", 1))
    graph = captured(module, x())
    with torch.no_grad():
        assert reason(module, graph, x()) is None
        module.gain = 2
        assert reason(module, graph, x()) == "gain now exists"


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
    for argument in ((item for item in ()), threading.Lock(), lambda value: value):
        with pytest.raises(NotCaptured, match="argument argument 1 is of type"):
            refuse_opaque(flatten((x(), argument), {}))
    refuse_opaque(flatten((x(), {"scale": 2}, Colour.RED, torch.tanh), {"flag": None}))


def test_enum_and_function_arguments_are_guarded_by_identity():
    module = Block(lambda self, x, finish, colour: finish(self.first(x)) if colour is Colour.RED else x)
    graph = capture(module, (x(), torch.tanh, Colour.RED), {})
    assert reason(module, graph, x(), torch.tanh, Colour.RED) is None
    assert reason(module, graph, x(), torch.sigmoid, Colour.RED) == "argument 1 is another object"
    assert reason(module, graph, x(), torch.tanh, Colour.BLUE) == "argument 2 is another object"


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
