"""Dropout that siblings share: one mask for all that meet the same input, drawn anew for every other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.attach import all_attached


class Heads(nn.Module):
    """Two linears on one input, and one on the result."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.q(x) + self.k(x))
        return result


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Heads() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def zeros() -> Blocks:
    model = Blocks()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def tuned(shared: bool, backend: str = "auto") -> nn.Module:
    """Return blocks whose adapters pass their input on: A and B are identities, and the base weights zero."""
    model = zeros()
    lora = {"r": 16, "alpha": 16, "dropout": 0.5, "share_dropout": shared}
    adapted = lora_fx.apply(
        model, {"version": 1, "rules": [{"match": {"name": "**"}, "lora": lora}]}, (torch.randn(2, 16),), backend
    )
    for _, adapter in all_attached(adapted):
        nn.init.eye_(adapter.lora_A.weight)
        nn.init.eye_(adapter.lora_B.weight)
    return adapted.train()


both = pytest.mark.parametrize("backend", ["auto", "modules"])


@both
def test_siblings_drop_the_same_entries_and_the_next_layer_others(backend: str):
    head = tuned(True, backend).blocks[0]
    x = torch.ones(64, 16)
    torch.manual_seed(1)
    q, k = head.q(x), head.k(x)
    assert torch.equal(q, k)
    assert set(q.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(head.out(q), q * 2)


@both
def test_without_sharing_siblings_drop_other_entries(backend: str):
    head = tuned(False, backend).blocks[0]
    x = torch.ones(64, 16)
    assert not torch.equal(head.q(x), head.k(x))


@both
def test_second_forward_on_the_same_tensor_draws_anew(backend: str):
    model = tuned(True, backend)
    x = torch.ones(64, 16)
    assert not torch.equal(model(x), model(x))


@both
def test_input_that_was_written_to_is_another_input(backend: str):
    head = tuned(True, backend).blocks[0]
    x = torch.ones(64, 16)
    first = head.q(x)
    x.mul_(1)
    assert not torch.equal(first, head.k(x))


def test_graph_draws_what_modules_draw():
    x = torch.randn(3, 16)
    results = []
    for model in (tuned(True), tuned(True, "modules")):
        for seed in (0, 0, 1):  # twice: the first call with gradients is compared with the forward
            torch.manual_seed(seed)
            results.append(model(x.clone().requires_grad_()).detach())
    torch.testing.assert_close(results[:3], results[3:], rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[1], results[2])


def test_plan_and_file_say_that_dropout_is_shared(tmp_path):
    adapted = tuned(True)
    assert "dropout=0.5 shared" in str(lora_fx.plan(Blocks(), {"version": 1, "rules": [
        {"match": {"name": "**"}, "lora": {"dropout": 0.5, "share_dropout": True}}]}))  # fmt: skip
    lora_fx.save(adapted, tmp_path)
    loaded = lora_fx.load(zeros(), tmp_path)
    assert {adapter.spec.lora.share_dropout for _, adapter in all_attached(loaded)} == {True}


@both
def test_siblings_share_under_autocast_too(backend: str):
    head = tuned(True, backend).blocks[0]
    x = torch.ones(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.q(x), head.k(x))
