"""Structural copies of models, on shared storage."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.models.twin import make_twin
from tests.support import zoo


def test_twin_shares_memory_keeps_ties_and_is_frozen():
    model = zoo.Gpt()
    twin = make_twin(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert twin.get_parameter(name).untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        assert twin.get_parameter(name) is not parameter
    assert twin.lm_head.weight is twin.wte.weight
    assert not any(p.requires_grad for p in twin.parameters())


def test_twin_keeps_attributes_that_parameters_carry():
    model = zoo.Mlp()
    model.fc1.weight.tensor_parallel = "column"
    assert make_twin(model).fc1.weight.tensor_parallel == "column"


def test_twin_of_a_model_with_computed_weights_is_possible():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    assert torch.equal(make_twin(model)(x), model(x))


def takes_turns(own: nn.Module, start: str) -> nn.Module:
    """Return a module whose forward is one of two functions that hold each other; one of them holds the layer."""

    def even(x: torch.Tensor, more: int = 3) -> torch.Tensor:
        return odd(x, more - 1) if more else own(x)

    def odd(x: torch.Tensor, more: int = 3) -> torch.Tensor:
        return even(x, more - 1) if more else even(x, 0)

    model = nn.Module()
    model.layer, model.forward = own, {"even": even, "odd": odd}[start]
    return model


@pytest.mark.parametrize("start", ["even", "odd"])
def test_functions_that_hold_each_other_call_the_copy_whichever_comes_first(start: str):
    model = takes_turns(nn.Linear(4, 4), start)
    twin = make_twin(model)
    with torch.no_grad():
        twin.layer.weight = nn.Parameter(torch.zeros(4, 4))
        assert torch.equal(twin(torch.randn(2, 4)), twin.layer.bias.expand(2, 4))


def test_list_that_a_function_writes_to_is_one_list_in_the_twin():
    calls: list[object] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return layer(x) + len(calls)

    model, layer = nn.Module(), nn.Linear(4, 4)
    model.layer, model.forward = layer, forward
    calls.append(forward)
    twin, x = make_twin(model), torch.randn(2, 4)
    assert torch.equal(twin(x), layer(x) + 2)
    assert torch.equal(twin(x), layer(x) + 3)
    assert len(calls) == 1


class Scaled(nn.Module):
    __slots__ = ("gain",)

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(4, 4), 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.gain


@pytest.mark.parametrize("backend", ["auto", "modules"])
def test_modules_with_slots_are_refused_by_name_before_anything_runs(backend: str):
    model, rules = nn.Sequential(Scaled(), Scaled()), {"rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]}
    with pytest.raises(AttributeError, match="gain"):
        copy.deepcopy(model)(torch.ones(4))  # torch's own copies lose them: there is nothing to follow
    with pytest.raises(RefusedError, match="leave __slots__ out") as caught:
        lora_fx.apply(model, rules, (torch.ones(2, 4),), backend=backend)
    assert caught.value.refusals == (("0", "gain"), ("1", "gain"))
