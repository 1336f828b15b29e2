"""remerge on graphs made at random from linears and thin products: whatever is folded, the results stay the same."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_fx import passes
from lora_fx.remerging.graph import Remerge

WIDTH, RANK = 12, 3
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Random(nn.Module):
    """A few statements, chosen by a seed, on few weights: so they are shared, used twice, in sums of sums."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.W = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=index != 1) for index in range(3))
        self.A = nn.ParameterList(torch.zeros(RANK, WIDTH) for _ in range(3))
        self.B = nn.ParameterList(torch.zeros(WIDTH, RANK) for _ in range(3))
        self.trained = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("fixed", torch.tensor(0.3))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        choose, values = random.Random(self.seed), [x]
        for _ in range(choose.randint(3, 9)):
            self.add(choose, values)
        return torch.tanh(sum(values[-2:], values[-1] * 0.5))

    def add(self, choose: random.Random, values: list[Tensor]) -> None:
        v, other = choose.choice(values[-4:]), choose.choice(values[-4:])
        W, number = self.W[choose.randrange(3)], choose.randrange(3)
        A, B = self.A[number], self.B[choose.choice([number, number, choose.randrange(3)])]
        statement = choose.choice([*"lllwpasrcfoi"])
        if statement == "l":
            y, d = W(v), self.product(choose, choose.choice([v, v, v, v, v, other]), A, B)
            values += [y] if choose.random() < 0.1 else []
            sums = [lambda: y + d, lambda: d + y, lambda: torch.sub(y, d), lambda: torch.add(y, d, alpha=1.5)]
            values.append(choose.choice(sums)())
        elif statement == "c":
            q, k = F.linear(v, torch.cat([A, self.A[0]])).chunk(2, dim=-1)
            values += [W(v) + F.linear(q, B), self.W[0](v) + F.linear(k, B)]
        elif statement == "f":
            q, k = W(v).chunk(2, dim=-1)
            values.append(torch.cat([q + F.linear(F.linear(v, A), B[: WIDTH // 2]), k], dim=-1))
        elif statement == "i":
            y = W(v)
            y += F.linear(F.linear(v, A), B)
            values.append(y)
        else:
            plain = {
                "w": lambda: F.linear(v, W.weight + (B @ A) * 0.5, W.bias),
                "p": lambda: F.linear(F.linear(v, A), B),
                "a": lambda: v + other,
                "s": lambda: v * choose.choice([2.0, self.fixed, self.trained]),
                "r": lambda: torch.relu(v),
                "o": lambda: torch.cat([v[..., :5], v[..., 5:]], dim=-1),
            }
            values.append(plain[statement]())

    def product(self, choose: random.Random, v: Tensor, A: Tensor, B: Tensor) -> Tensor:
        forms = [
            lambda: F.linear(F.linear(v, A), B),
            lambda: v @ A.T @ B.T * 0.5,
            lambda: v @ (B @ A).T,
            lambda: -(F.linear(v / 2.0, A) @ B.t()) * self.fixed,
            lambda: F.linear(F.dropout(v, 0.1, False), A * 2.0) @ B.T,
        ]
        return choose.choice(forms)()


def folds(seeds: range, how: str) -> int:
    """Return how many weights took up a product, having compared every graph with what became of it."""
    number = 0
    for seed in seeds:
        model = Random(seed).double().eval()
        graph = fx.symbolic_trace(model) if how == "fx" else torch.export.export(model, (X,)).module()
        work = Remerge()
        plain = passes.run(graph, [work]).graph_module
        torch.testing.assert_close(
            plain(X), graph(X), rtol=1e-9, atol=1e-9, msg=lambda text, seed=seed: f"{seed}: {text}"
        )
        number += len(work.folded)
    return number


@pytest.mark.parametrize("how", ["fx", "export"])
def test_results_stay_the_same(how):
    assert folds(range(30), how) > 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fx", "export"])
def test_results_of_many_graphs_stay_the_same(how):
    print(folds(range(30, 120), how), "weights took up a product")


@pytest.mark.fuzz
@pytest.mark.parametrize("how", ["fx", "export"])
def test_results_of_very_many_graphs_stay_the_same(how):
    print(folds(range(120, 2000), how), "weights took up a product")
