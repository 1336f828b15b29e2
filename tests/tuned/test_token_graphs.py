"""Rows of an embedding that are trained alone, in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.wordmodels import IDS, WORDS, by_hand, fill, model, rows_in, rules


def test_graph_module_has_rows_too():
    graph = torch.fx.symbolic_trace(model())
    tuned = lora_fx.apply(graph, rules())
    fill(tuned)
    (rows,) = rows_in(tuned).values()
    torch.testing.assert_close(tuned(WORDS), by_hand(tuned, dict(zip(IDS, rows.detach(), strict=True)))(WORDS))
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(WORDS), model()(WORDS))
    torch.testing.assert_close(lora_fx.merge(tuned)(WORDS), tuned(WORDS))
    assert torch.equal(lora_fx.remove(tuned)(WORDS), model()(WORDS))


class Inside(nn.Module):
    """A repeated block that has the embedding and the head tied to it inside."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.q, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.head(self.q(self.words(ids)) + x).softmax(-1) @ self.words.weight


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inside() for _ in range(2))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, ids)
        return x


@pytest.mark.parametrize("added", [False, True], ids=["from the start", "added"])
def test_graph_of_a_block_with_the_embedding_inside_has_the_bits_of_the_modules(added):
    torch.manual_seed(0)
    caller, x = Holding().eval(), torch.randn(2, 4, 6)
    given = {"rules": [{"match": {"name": "**.q"}, "lora": {"r": 2}}]}
    both = given | {"tokens": [{"name": "**.words", "ids": IDS}]}
    results = []
    for backend in ("graph", "modules"):
        tuned: Any = lora_fx.apply(caller, given if added else both, (x, WORDS), backend=backend, optimise=False)
        if added:
            lora_fx.add(tuned, both, adapter="b")
            lora_fx.use(tuned, "b")
        assert torch.equal(tuned(x, WORDS), caller(x, WORDS))
        fill(tuned, "b" if added else "default")
        result = tuned(x, WORDS)
        result.square().sum().backward()
        results.append([result, *(p.grad for p in rows_in(tuned, "b" if added else "default").values())])
        regions = lora_fx.inspect(tuned).regions
        assert sum(region.graphs for region in regions) == (2 if backend == "graph" else 0)
    assert all(map(torch.equal, *results))
