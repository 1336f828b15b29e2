"""What leaving out rows gains on real architectures, tiny: most of those that lie beside a checkout, the rest say why not."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tests.support import shared, zoo
from tests.support.gains import Gain, gain_of

MODELS = shared.load("models")
NAMES = tuple(MODELS.zoo()) if MODELS is not None else ()
QUICK = ("bert", "llama")
GAIN = 20
"""How many of them gain by padding or labels, at the least."""


@functools.cache
def gain(name: str) -> Gain:
    assert MODELS is not None
    torch.manual_seed(0)
    model, inputs = MODELS.zoo()[name]()
    return gain_of(MODELS.zero_dropout(model), inputs, MODELS.main_tensors)


@pytest.mark.parametrize("name", [name for name in NAMES if name in QUICK])
def test_padding_and_tokens_without_a_label_are_left_out(name: str) -> None:
    found = gain(name)
    assert found.padding
    assert found.labels
    assert found.ratio < 0.5


def test_a_model_of_ours_gains_by_its_first_tokens() -> None:
    torch.manual_seed(0)
    found = gain_of(zoo.Encoder(), lambda batch, length: ((zoo.tokens(batch, length),), {}), lambda result: [result])
    assert found.labels
    assert found.ratio < 0.9


def test_a_model_that_gains_nothing_says_why() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).tanh()
            return x.sum(1)

    found = gain_of(Sum(), lambda batch, length: ((torch.randn(batch, length, 8),), {}), lambda result: [result])
    assert not found.is_one
    assert found.reasons


@pytest.mark.slow
def test_most_architectures_gain_and_the_others_say_why_not() -> None:
    found = {name: gain(name) for name in NAMES}
    assert sum(each.is_one for each in found.values()) >= GAIN * bool(found)
    assert [name for name, each in found.items() if not each.is_one and not each.reasons] == []
