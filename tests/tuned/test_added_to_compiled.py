"""Adapters that are added to a model which torch.compile has compiled, and has run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.twoadapters import BOTH, DORA, WIDE, alone, given

X = given()
CHOICES = ("b", ["default", "b"], None, {"default": 0.5, "b": -1.0}, "default")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(tuned: nn.Module, backend: str, in_place: bool) -> nn.Module:
    if in_place:
        tuned.compile(backend=backend)
        return tuned
    made: Any = torch.compile(tuned, backend=backend)
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(X).square().sum().backward()
    named = {name.replace("_orig_mod.", ""): parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in named.items() if gradient is not None}


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True], ids=["around it", "in place"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rules", [WIDE, DORA], ids=["plain", "dora"])
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["modules", "graphs"])
@pytest.mark.filterwarnings("ignore")
def test_added_adapter_is_chosen_trained_and_dropped_as_without_compiling(inputs, rules, backend, in_place):
    plain, tuned = (alone(BOTH, "a", inputs) for _ in range(2))
    model = compiled(tuned, backend, in_place)
    first = model(X).detach()
    torch.testing.assert_close(first, plain(X), rtol=1e-6, atol=1e-6)
    for one in (model, plain):
        torch.manual_seed(3)
        lora_fx.add(one, rules, adapter="b")
    torch.testing.assert_close(model(X), first, rtol=1e-6, atol=1e-6)
    for choice in CHOICES:
        lora_fx.use(model, choice)
        lora_fx.use(plain, choice)
        torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)
        if choice is None:
            continue
        mine, other = gradients(model), gradients(plain)
        assert mine.keys() == other.keys()
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=2e-5)
    lora_fx.drop(model, "b")
    torch.testing.assert_close(model(X), first, rtol=1e-6, atol=1e-6)
    with lora_fx.disabled(model):
        assert torch.equal(model(X), lora_fx.remove(model)(X))


def test_another_adapter_in_use_is_seen():
    tuned = alone(BOTH, "a")
    model = compiled(tuned, "eager", in_place=False)
    before = model(X).detach()
    lora_fx.add(model, WIDE, adapter="b")
    lora_fx.use(model, "b")
    assert not torch.allclose(model(X), before)
