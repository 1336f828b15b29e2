"""Structural copies of models, on shared storage."""

from __future__ import annotations

import torch
from torch import nn

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
