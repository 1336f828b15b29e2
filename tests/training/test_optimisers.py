"""Optimisers of torch, torchao and bitsandbytes that keep their states in other ways, and tensors that are exchanged under a model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx

WIDTH, STEPS = 64, 3
X = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1))
RULES = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 64, "alpha": 64}}]}
"""64 · 64 numbers in a factor: from 4,096 on torchao's optimisers hold states in few bits."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + F.silu(self.gate(h)) * self.up(h)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def adapted(backend: str = "auto", model: nn.Module | None = None) -> nn.Module:
    model = base() if model is None else model
    torch.manual_seed(2)
    return lora_fx.apply(model, RULES, (X,), backend=backend)


def torchao(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return getattr(pytest.importorskip("torchao.optim"), name)(parameters, 1e-2)

    return make


OPTIMISERS = {
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "AdamW8bit": torchao("AdamW8bit"),
    "AdamW4bit": torchao("AdamW4bit"),
    "AdamWFp8": torchao("AdamWFp8"),
    "bitsandbytes": lambda p: pytest.importorskip("bitsandbytes").optim.AdamW8bit(p, 1e-2),
}


def step(tuned: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    loss = (tuned(X) - 1).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def from_disk(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state as a checkpoint holds it; torchao's cannot be copied otherwise."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "4" in name or "Fp8" in name else []) for name in OPTIMISERS],
)
def test_optimiser_trains_graphs_as_modules_and_goes_on_from_its_state(name):
    runs = []
    for backend in ("auto", "modules"):
        tuned = adapted(backend)
        optimiser = OPTIMISERS[name](lora_fx.parameters(tuned))
        losses = [step(tuned, optimiser) for _ in range(STEPS)]
        other = copy.deepcopy(tuned)
        resumed = OPTIMISERS[name](lora_fx.parameters(other))
        resumed.load_state_dict(from_disk(optimiser.state_dict()))
        last = step(tuned, optimiser)
        assert step(other, resumed) == last
        assert last < losses[0]
        with torch.no_grad():
            torch.testing.assert_close(lora_fx.merge(tuned)(X), tuned(X), rtol=1e-4, atol=1e-5)
        runs.append([*losses, last])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    states = [value for one in optimiser.state.values() for value in one.values() if isinstance(value, Tensor)]
    few = any("OptimState" in type(state).__name__ or state.dtype == torch.uint8 for state in states)
    assert few == (name not in ("fused", "foreach")), "its states are really in few bits"


@pytest.fixture
def swapped_on_conversion() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapped_on_conversion")
@pytest.mark.parametrize(
    "change",
    [
        lambda tuned: tuned.double(),
        lambda tuned: tuned.load_state_dict(
            {name: value + 0.01 if "lora_" in name else value.clone() for name, value in tuned.state_dict().items()}
        ),
    ],
)
def test_parameters_that_are_swapped_on_conversion_stay_those_of_the_optimiser_and_leave_the_base(change):
    given = base()
    tuned, plain = adapted(model=given), adapted("modules")
    optimiser = torch.optim.AdamW(lora_fx.parameters(tuned), 1e-2)
    own = list(lora_fx.parameters(tuned))
    change(tuned)
    change(plain)
    assert all(one is other for one, other in zip(own, lora_fx.parameters(tuned), strict=True))
    x = X.to(own[0].dtype)
    torch.testing.assert_close(tuned(x), plain(x))
    before = [parameter.detach().clone() for parameter in own]
    (tuned(x) - 1).square().mean().backward()
    optimiser.step()
    assert not any(torch.equal(one, other) for one, other in zip(own, before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(given.parameters(), base().parameters(), strict=True))


def test_tensors_that_are_swapped_by_hand_are_computed_with():
    tuned = adapted()
    site = tuned[0].up
    with torch.no_grad():
        site.lora_B["default"].weight.fill_(0.1)
    expected = copy.deepcopy(tuned)
    for get in (lambda m: m.lora_A["default"].weight, lambda m: m.get_parameter("weight")):
        value = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            get(expected[0].up).copy_(value)
        torch.utils.swap_tensors(get(site), nn.Parameter(value, requires_grad=get(site).requires_grad))
        torch.testing.assert_close(tuned(X), expected(X))
    with torch.no_grad():
        torch.testing.assert_close(lora_fx.merge(tuned)(X), tuned(X), rtol=1e-4, atol=1e-5)
