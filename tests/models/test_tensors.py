"""Parameters and buffers by dotted name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_fx.models.tensors import borrowed, get_tensor, own_parameters, set_tensor
from tests.support import zoo


def test_tensors_can_be_set_owned_and_borrowed_by_name():
    model = zoo.Gpt()
    own_parameters(model, ["lm_head.weight"], requires_grad=True)
    assert model.lm_head.weight is not model.wte.weight
    other = torch.zeros_like(model.wte.weight)
    before = get_tensor(model, "wte.weight")
    with borrowed(model, {"wte.weight": other}):
        assert not model.wte.weight.any()
    assert get_tensor(model, "wte.weight") is before
    set_tensor(model, "wte.weight", nn.Parameter(other))
    assert not model.wte.weight.any()
    with pytest.raises(KeyError):
        get_tensor(model, "wte.nothing")
