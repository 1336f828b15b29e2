"""An adapter for each row, among other choices, other numbers of rows, and calls of parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from tests.support.twoadapters import alone, model, two

MIXED = ["b", None, "a", "a"]


def batch(rows: int = 4, tokens: int = 5) -> Tensor:
    return torch.randn(rows, tokens, 6, generator=torch.Generator().manual_seed(2))


def one_by_one(tuned: nn.Module, names: list[str | None], x: Tensor) -> Tensor:
    results = []
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            results.append(tuned(x[number : number + 1]))
    return torch.cat(results)


def test_the_innermost_choice_holds():
    tuned = two()
    inner, outer = ["a", None], MIXED
    with lora_fx.rows(tuned, outer):
        first = tuned(batch())
        with lora_fx.rows(tuned, inner):
            assert_close(tuned(batch(2)), one_by_one(tuned, inner, batch(2)), atol=1e-6, rtol=1e-6)
            with lora_fx.use(tuned, "b"):
                assert torch.equal(tuned(batch(3)), alone_b(batch(3)))
            with lora_fx.disabled(tuned):
                assert torch.equal(tuned(batch(3)), model()(batch(3)))
            with pytest.raises(lora_fx.RefusedError, match="for 2 rows"):
                tuned(batch())
        assert torch.equal(tuned(batch()), first)
    assert not tuned._forward_pre_hooks
    assert torch.equal(tuned(batch()), two()(batch()))


def alone_b(x: Tensor) -> Tensor:
    tuned = two()
    lora_fx.use(tuned, "b")
    return tuned(x)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 12])
def test_another_number_of_rows_is_refused(rows):
    tuned = two()
    with lora_fx.rows(tuned, MIXED), pytest.raises(lora_fx.RefusedError, match="for 4 rows"):
        tuned(batch(rows))
    with lora_fx.rows(tuned, MIXED):
        tuned(batch())  # now that it is known where the batch is
        with pytest.raises(lora_fx.RefusedError, match="for 4 rows"):
            tuned(batch(rows))


class Flat(nn.Module):
    """Its layer sees the tokens of all rows below each other."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x).view_as(x)


def test_a_part_whose_rows_nobody_counts_is_not_called_alone():
    rules = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2, "init": "random"}}]}
    tuned = lora_fx.apply(Flat(), rules, backend="modules")
    names = ["default", None, "default", "default"]
    with lora_fx.rows(tuned, names):
        tuned(batch()).sum().backward()
        with pytest.raises(lora_fx.RefusedError, match="not a part of it"):
            tuned.part(batch(8))
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, names, batch()), atol=1e-6, rtol=1e-6)


def test_one_adapter_may_be_all_that_a_model_has():
    tuned = alone({"version": 1, "rules": [{"match": {"name": "**.q"}, "lora": {"r": 2, "init": "random"}}]}, "a")
    names = ["default", None]
    with lora_fx.rows(tuned, names):
        together = tuned(batch(2))
    assert_close(together, one_by_one(tuned, names, batch(2)), atol=1e-6, rtol=1e-6)
