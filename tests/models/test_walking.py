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
