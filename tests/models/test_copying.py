"""Copies of modules that are made at once are those that copy.deepcopy makes."""

from __future__ import annotations

import copy
import enum
import weakref
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lora_fx
from lora_fx.models.copying import _is_plain, _is_simple, copied_tree, copied_value
from tests.support.portraits import difference, portrait_of_state
from tests.support.zoo import ZOO, Specimen, randomise_, rules


class Own(nn.Module):
    """Copies itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.copies = nn.Linear(2, 2), 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        made = Own()
        made.inner, made.copies = copy.deepcopy(self.inner, memo), self.copies + 1
        return made


class Stateful(nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept": "by itself"}


class Delegating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def __getattr__(self, name: str) -> Any:
        return (
            super().__getattr__(name) if name in ("inner", "_modules") else getattr(super().__getattr__("inner"), name)
        )


class Holder(nn.Module):
    """Holds what a copy must hold in the same way: shared objects, cycles, lists of modules, tensors, hooks."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.children_ = nn.ModuleList(children)
        self.shared = {"a": [1, 2]}
        self.again = self.shared
        self.listed, self.named = [*children, self], {"first": children[0], "none": None}
        self.tensor, self.tuple = torch.ones(3), (torch.zeros(2), "text")
        self.empty: dict[str, int] = {}
        self.empty_too = self.empty
        self.register_buffer("buffer", torch.arange(3.0))
        self.tied = children[0]
        self.register_forward_hook(_hook)


def _hook(module: nn.Module, args: Any, result: Any) -> None:
    """Do nothing."""


def plain() -> Holder:
    return Holder(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.GELU()), nn.ModuleDict({"a": nn.LayerNorm(2)}))


def special() -> Holder:
    normed = parametrizations.weight_norm(nn.Linear(2, 2))
    return Holder(nn.Linear(2, 2), Own(), Stateful(2, 2), Delegating(), nn.MultiheadAttention(2, 1), normed)


def check_structure(duplicate: nn.Module, model: nn.Module) -> None:
    first, *_ = duplicate.children_
    assert duplicate.again is duplicate.shared
    assert duplicate.shared is not model.shared
    assert duplicate.empty_too is duplicate.empty
    assert duplicate.empty is not model.empty
    assert duplicate.listed[0] is duplicate.tied is duplicate.named["first"] is first
    assert duplicate.listed[-1] is duplicate
    assert first is not model.tied
    assert torch.equal(duplicate.tensor, model.tensor)
    assert duplicate.tensor is not model.tensor
    assert duplicate.tuple[1] == "text"
    assert duplicate.tuple[0] is not model.tuple[0]
    assert duplicate._forward_hooks is not model._forward_hooks
    assert list(duplicate._forward_hooks.values()) == [_hook]


@pytest.mark.parametrize("make", [plain, special])
def test_copy_is_that_of_deepcopy(make: Callable[[], Holder]):
    model = make()
    mine, theirs = copied_tree(model, {}), copy.deepcopy(model)
    check_structure(mine, model)
    check_structure(theirs, model)
    assert difference(portrait_of_state(mine), portrait_of_state(theirs), "state") is None
    assert [list(vars(module)) for module in mine.modules()] == [list(vars(module)) for module in theirs.modules()]


def test_only_modules_whose_classes_leave_it_to_python_are_copied_at_once():
    assert all(map(_is_plain, map(type, plain().modules())))
    assert [type(module).__name__ for module in special().children_ if not _is_plain(type(module))] == [
        "Own", "Stateful", "Delegating", "MultiheadAttention", "ParametrizedLinear",
    ]  # fmt: skip
    layer = nn.Linear(2, 2)
    layer.__deepcopy__ = lambda memo: "mine"
    assert copied_tree(layer, {}) == "mine"


def test_copies_are_made_at_once_where_torchs_compiler_has_replaced_the_method_that_takes_a_state(monkeypatch):
    set_state, told = nn.Module.__setstate__, []
    monkeypatch.setattr(nn.Module, "__setstate__", lambda self, state: told.append(self) or set_state(self, state))
    model = plain()
    assert all(map(_is_plain, map(type, model.modules())))
    assert {id(child) for child in copied_tree(model, {}).modules()} == {id(child) for child in told}


def test_what_the_memo_says_stands_in_the_copy():
    model = plain()
    weight = nn.Parameter(torch.zeros(2, 2))
    duplicate = copied_tree(model, {id(model.tied.weight): weight, id(model.buffer): model.buffer})
    assert duplicate.tied.weight is weight
    assert duplicate.listed[0].weight is weight
    assert duplicate.buffer is model.buffer


@pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
@pytest.mark.filterwarnings("ignore::lora_fx.LoraFxWarning")
def test_copy_of_an_adapted_model_is_that_of_deepcopy(specimen: Specimen):
    tuned = lora_fx.apply(specimen.build(), rules(specimen.rule), specimen.sample())
    mine, theirs = copied_tree(tuned, {}), copy.deepcopy(tuned)
    assert [(path, type(module)) for path, module in mine.named_modules()] == [
        (path, type(module)) for path, module in theirs.named_modules()
    ]
    assert difference(portrait_of_state(mine), portrait_of_state(theirs), "state") is None
    sample = specimen.sample(3, 6)
    for one, other in zip(mine.modules(), theirs.modules(), strict=True):
        assert list(vars(one)) == list(vars(other))
    with torch.no_grad():
        one, other = (model(*sample.args, **sample.kwargs) for model in (mine, theirs))
    assert torch.equal(one[0] if isinstance(one, tuple) else one, other[0] if isinstance(other, tuple) else other)


def test_what_cannot_be_copied_raises_as_in_deepcopy():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].generator = (number for number in range(3))
    with pytest.raises(TypeError, match="generator"):
        copied_tree(model, {})


class Named:
    """Answers questions about itself as transformers' configurations do."""

    def __init__(self) -> None:
        self.size, self.names, self.inner = 3, ["a", {"b": (1, [2])}], None

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("size" if name == "width" else name)


class Borrowing(Named):
    """Copies itself, as only its objects tell."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__deepcopy__":
            return lambda memo: "copied by itself"
        return super().__getattribute__(name)


class Slotted:
    __slots__ = ("__dict__", "first")


class Reduced:
    def __reduce__(self) -> Any:
        return (str, ("made anew",))


class Kept:
    def __getstate__(self) -> dict[str, Any]:
        return {"kept": True}


@dataclass(frozen=True, slots=True)
class Frozen:
    inner: Any


class Color(enum.Enum):
    RED = 1


Pair = namedtuple("Pair", ("first", "second"))


def odd_values() -> dict[str, Any]:
    named, slotted, ring, kept = Named(), Slotted(), [1], Kept()
    named.inner, slotted.first, slotted.other = named, [1], {2: "two"}
    ring.append((ring, ring))
    kept.lost = 1
    shared = [Frozen(["x"])]
    return {
        "named": named, "slotted": slotted, "ring": ring, "kept": kept, "shared": (shared, shared, Color.RED),
        "counted": Counter("aab"), "ordered": OrderedDict(b=[1], a=2), "pair": Pair([1], (2,)), "set": {1, (2, 3)},
        "constants": (1, ("a", None)), "type": Named, "method": named.__init__, "keys": {(1, Color.RED): [0.5]},
        "reduced": Reduced(), "borrowing": Borrowing(), "tensor": torch.ones(2), "size": torch.Size([1]),
    }  # fmt: skip


def outline(value: Any, met: dict[int, int]) -> Any:
    """Return a value as nested tuples: of what is in it for the second time, which one it is."""
    if isinstance(value, (int, float, str, type(None), type, enum.Enum, torch.Size)):
        return repr(value)
    if id(value) in met:
        return met[id(value)]
    met[id(value)] = len(met)
    name = type(value).__name__
    if callable(value):
        return name, outline(value.__self__, met)
    if isinstance(value, torch.Tensor):
        return name, value.tolist()
    if isinstance(value, dict):
        return name, [(outline(key, met), outline(part, met)) for key, part in value.items()]
    if isinstance(value, (list, tuple, set)):
        return name, [outline(part, met) for part in value]
    slots = [outline(getattr(value, slot), met) for slot in ("first", "inner") if slot in dir(type(value))]
    own = object.__getattribute__(value, "__dict__") if hasattr(value, "__dict__") else {}
    return name, slots, [(key, outline(part, met)) for key, part in own.items()]


def test_copy_of_a_value_is_that_of_deepcopy():
    value = odd_values()
    mine, theirs = copied_value(value, {}), copy.deepcopy(value)
    for name in value:
        assert outline(mine[name], {}) == outline(theirs[name], {}), name
        assert (mine[name] is value[name]) == (theirs[name] is value[name]) or name == "size"
    assert outline(mine, {}) == outline(theirs, {})
    assert mine["method"].__self__ is mine["named"]
    assert [name for name, part in value.items() if _is_simple(part)] == ["named"]


def test_the_memo_says_what_stands_in_the_copy_of_a_value():
    value = odd_values()
    memo = {id(value["tensor"]): "a tensor", id(value["shared"][0]): "a list"}
    copied = copied_value(value, memo)
    assert (copied["tensor"], copied["shared"]) == ("a tensor", ("a list", "a list", Color.RED))
    assert copied_value(value["named"], memo) is copied["named"]


class Called(nn.Module):
    """Calls a layer of the module that holds it, which it knows by weak references only."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.up = weakref.ref(owner)
        self.known = {"owner": [self.up]}
        self.by_name = weakref.WeakValueDictionary({"owner": owner})
        self.numbers = weakref.WeakKeyDictionary({owner: [1]})
        self.all = weakref.WeakSet([owner])
        object.__setattr__(self, "near", weakref.proxy(owner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up().layer(x)


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.called = nn.Linear(4, 4), Called(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x)


class CopiesItself(Calls):
    """Leaves no way but Python's own."""

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        made = memo[id(self)] = object.__new__(type(self))
        nn.Module.__setstate__(made, copy.deepcopy(nn.Module.__getstate__(self), memo))
        return made


@pytest.mark.parametrize("kind", [Calls, CopiesItself])
def test_weak_references_of_a_copy_are_to_modules_of_the_copy(kind: type[nn.Module]) -> None:
    model = kind()
    tuned = lora_fx.apply(model, rules(r=2), backend="modules")
    randomise_(tuned)
    x = torch.randn(2, 4)
    assert torch.equal(tuned(x), tuned.layer(x))
    assert not torch.equal(tuned(x), model(x))
    for one in (model, tuned):
        inner = one.called
        assert inner.up() is one
        assert inner.near.__repr__.__self__ is one
        assert [*inner.by_name.values(), *inner.numbers, *inner.all] == [one] * 3
    if kind is Calls:
        assert tuned.called.known["owner"][0]() is tuned
