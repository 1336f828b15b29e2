"""A small model with two adapters, and what each has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx

BOTH = {"version": 1, "rules": [{"match": {"name": "**.{q,k}"}, "lora": {"r": 2, "alpha": 4, "init": "random"}}]}
WIDE = {"version": 1, "rules": [{"match": {"name": "**.{k,out}"}, "lora": {"r": 3, "alpha": 3, "init": "random"}}]}
DORA = {"version": 1, "rules": [{"match": {"name": "**.q"}, "lora": {"r": 2, "dora": True, "init": "random"}}]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.q(x) * self.k(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def given() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


BACKENDS = pytest.mark.parametrize("inputs", [None, (given(),)], ids=["modules", "graphs"])


def alone(rules: Any, name: str, inputs: Any = None) -> nn.Module:
    """Return a model with this adapter only, with the values that `two` has it with."""
    torch.manual_seed(7 if name == "a" else 8)
    return lora_fx.apply(model(), rules, inputs, backend="auto" if inputs else "modules")


def two(inputs: Any = None) -> nn.Module:
    """Return a model with "a", which is used, and "b", which is not."""
    tuned = alone(BOTH, "a", inputs)
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, alone(WIDE, "b"), adapter="b")
    return tuned


def values(tuned: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tuned.state_dict().items()}


def factors(tuned: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the factors of one adapter, by the path of their site and A or B."""
    parts = ((key.split(f".{name}."), value) for key, value in tuned.state_dict().items() if f".{name}." in key)
    return {part[0]: value for part, value in parts}


def pairs(tuned: nn.Module, name: str) -> list[tuple[Tensor, Tensor]]:
    found = factors(tuned, name)
    return [(A, found[path.replace("lora_A", "lora_B")]) for path, A in found.items() if path.endswith("lora_A")]
