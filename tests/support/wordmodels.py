"""A small model of words, tied to its head or not, of which rows are trained alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.twoadapters import Block

IDS = [3, 7, 11]
WORDS = torch.tensor([[3, 1, 7, 7], [2, 11, 0, 5]])
BACKENDS = pytest.mark.parametrize("inputs", [None, (WORDS,)], ids=["modules", "graphs"])


class Words(nn.Module):
    def __init__(self, tied: bool = True, kind: type[nn.Embedding] = nn.Embedding, **options: Any) -> None:
        super().__init__()
        self.words = kind(20, 6, **options)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 20, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model(tied: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    return Words(tied, **options).eval()


def rules(ids: Any = IDS, adapter: str = "default", **more: Any) -> dict[str, Any]:
    lora = {"r": 2, "init": "random", "adapter": adapter}
    rule = {"match": {"name": "**.{q,k}"}, "lora": lora}
    return {"version": 1, "rules": [rule], "tokens": [{"name": "words", "ids": ids}], **more}


def trained(inputs: Any = None, tied: bool = True, given: Any = None, **options: Any) -> Any:
    """Return an adapted model whose rows have values of their own."""
    tuned = lora_fx.apply(model(tied, **options), given or rules(), inputs, backend="auto" if inputs else "modules")
    fill(tuned)
    return tuned


def rows_in(tuned: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Return the rows that an adapter trains, by name; tied ones once."""
    return {name: p for name, p in tuned.named_parameters() if f"lora_trained.{adapter}.weight.rows" in name}


def fill(tuned: nn.Module, adapter: str = "default", seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rows_in(tuned, adapter).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def by_hand(tuned: Any, rows: dict[int, Tensor], tied: bool = True) -> Any:
    """Return the adapted model's own adapters on a base whose embedding has these rows."""
    plain = copy.deepcopy(model(tied))
    with torch.no_grad():
        for row, value in rows.items():
            plain.words.weight[row] = value
    same = lora_fx.apply(plain, {"rules": rules()["rules"]}, backend="modules")
    state = lora_fx.adapter_state(tuned)
    lora_fx.load_adapter_state(
        same, {name: value for name, value in state.items() if not name.endswith(("rows", "_extra_state"))}
    )
    return same
