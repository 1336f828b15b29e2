"""The lists of a model's modules, parameters and buffers are those that torch yields."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.models.walking import (
    _is_usual,
    all_buffers_of,
    all_names_of,
    all_parameters_of,
    buffers_in,
    devices_of,
    modules_of,
    named_buffers_of,
    named_modules_of,
    parameters_in,
    set_eval,
    set_training,
)
from tests.support.zoo import ZOO


class OwnNames(nn.Linear):
    """Calls its modules otherwise, as wrappers do."""

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        for path, module in super().named_modules(memo, prefix, remove_duplicate):
            yield path.upper(), module


def tied() -> nn.Module:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = nn.ModuleDict({"a": inner, "b": nn.ModuleList([inner[1], nn.ModuleDict({"c": inner}), nn.Linear(2, 2)])})
    model["b"][2].weight = inner[0].weight
    model["b"][2].register_buffer("mean", inner[1].running_mean)
    model["b"][2].nothing = None
    model.register_module("none", None)
    return model


def holding(child: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ModuleList([child]), nn.Linear(2, 2))


def check(model: nn.Module) -> None:
    assert named_modules_of(model) == list(model.named_modules())
    modules = modules_of(model)
    assert modules == list(model.modules())
    assert list(map(id, parameters_in(modules))) == list(map(id, model.parameters()))
    assert list(map(id, buffers_in(modules))) == list(map(id, model.buffers()))
    named = [(name, id(buffer)) for name, buffer in named_buffers_of(model)]
    assert named == [(name, id(buffer)) for name, buffer in model.named_buffers()]
    assert all_names_of(model) == list(model.named_modules(remove_duplicate=False))
    for found, theirs in ((all_parameters_of, model.named_parameters), (all_buffers_of, model.named_buffers)):
        by_name = [(name, id(tensor)) for name, tensor in theirs(remove_duplicate=False)]
        assert [(name, id(tensor)) for name, tensor in found(model)] == by_name
    assert devices_of(model) == {parameter.device for parameter in model.parameters()}


@pytest.mark.parametrize("model", [tied(), holding(OwnNames(2, 2)), nn.Linear(2, 2, device="meta"), nn.Identity()])
def test_lists_are_those_of_torch(model: nn.Module):
    check(model)


def test_lists_of_real_models_are_those_of_torch():
    for specimen in ZOO:
        check(specimen.build())


def test_a_scripted_module_is_walked_too():
    check(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))


def test_an_adapted_model_is_walked_in_one_loop():
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2)), r=1, target="*", backend="modules")
    check(tuned)
    assert all(map(_is_usual, map(type, tuned.modules())))
    assert not _is_usual(OwnNames)
    assert not _is_usual(type("Adapted", (type(tuned[0]), OwnNames), {}))


def test_a_module_that_holds_itself_is_no_endless_list():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model)
    with pytest.raises(RecursionError):
        all_names_of(model)


class Frozen(nn.BatchNorm1d):
    """Stays in eval mode, as detectors keep their norms."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class Hiding(nn.Sequential):
    """Keeps a child from torch's own way through the modules."""

    def children(self) -> Iterator[nn.Module]:
        return iter(list(super().children())[1:])


class Noting(nn.Linear):
    """Sets its attributes its own way."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["last"] = (name, value)


@pytest.mark.parametrize(
    "make", [tied, lambda: Frozen(2), lambda: Hiding(nn.Linear(2, 2), nn.ReLU()), lambda: Noting(2, 2)]
)
def test_modes_are_set_as_torch_sets_them(make: Any) -> None:
    for mode in (False, True, False):
        model, other = nn.Sequential(make(), nn.Dropout()), nn.Sequential(make(), nn.Dropout())
        other[1].training = model[1].training = not mode
        set_training(model, mode) if mode else set_eval(model)
        other.train(mode)
        assert [module.training for module in model.modules()] == [module.training for module in other.modules()]
        assert [vars(m).get("last") for m in model.modules()] == [vars(m).get("last") for m in other.modules()]
    calls = []
    model[1].train = lambda mode: calls.append(mode)
    set_training(model, True)
    assert calls == [True]


def test_modes_of_transformers_models_are_set_without_their_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = transformers.BertModel(transformers.BertConfig(**small))
    set_eval(model)
    assert not any(module.training for module in model.modules())
    called = []
    monkeypatch.setattr(
        nn.Linear, "train", lambda self, mode=True: (called.append(mode), nn.Module.train(self, mode))[1]
    )
    set_training(model, True)
    assert all(module.training for module in model.modules())
    assert called, "a class with a way of its own is asked"
    monkeypatch.undo()
    monkeypatch.setattr(type(model), "use_kernels", True)
    monkeypatch.setattr(type(model), "set_use_kernels", lambda self, use: called.append(use))
    called.clear()
    set_training(model, False)
    assert called == [True], "it chooses its kernels anew"
