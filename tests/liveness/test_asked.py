"""Rows that are asked for, one after the other and by sequence: each form is the other's, and both are of the tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_fx.liveness.asked import (
    Asked,
    asked_of,
    asked_rows,
    at_tokens,
    by_sequence,
    causal_at,
    one_after_the_other,
    size_with_all,
)

BATCH, LENGTH = 3, 5
EVEN, UNEVEN, ONE = [1, 3, 6, 8, 10, 14], [0, 2, 4, 7], [11]


def asked(numbers: list[int]) -> Asked:
    return asked_of(torch.tensor(numbers), BATCH, LENGTH)


def whole() -> Tensor:
    return torch.arange(BATCH * LENGTH * 2.0).view(BATCH, LENGTH, 2)


@pytest.mark.parametrize("numbers", [EVEN, UNEVEN, ONE])
def test_rows_go_from_one_form_to_the_other_and_back(numbers: list[int]) -> None:
    rows = asked_rows(whole(), asked(numbers))
    assert torch.equal(rows[0], whole().flatten(0, 1)[numbers])
    assert torch.equal(one_after_the_other(by_sequence(rows, asked(numbers)), asked(numbers)), rows)


def test_numbers_may_come_in_any_order_and_none_stand_for_the_first_row() -> None:
    assert asked([7, 0, 4, 2, 2]).rows.index.tolist() == UNEVEN
    assert asked_of(torch.zeros(0, dtype=torch.int64), BATCH, LENGTH).rows.index.tolist() == [0]


@pytest.mark.parametrize("numbers", [EVEN, UNEVEN, ONE])
def test_what_is_of_tokens_is_chosen_for_each_query(numbers: list[int]) -> None:
    wanted = asked(numbers)
    each = torch.randn(BATCH, 4, LENGTH, 6)
    for x in (each, each[:1], each[0, :1], each[0, 0]):
        found = one_after_the_other(at_tokens(x, wanted, 4, 2).transpose(1, 2), wanted)[0]
        expected = x.expand(each.shape).transpose(1, 2).flatten(0, 1)[numbers] if x.dim() == 4 else x.expand(
            BATCH, x.shape[0] if x.dim() == 3 else 1, LENGTH, 6
        ).transpose(1, 2).flatten(0, 1)[numbers]  # fmt: skip
        assert torch.equal(found, expected)


def test_queries_attend_to_no_later_key() -> None:
    mask = causal_at(asked(EVEN), torch.zeros(BATCH, 1, LENGTH, 4))
    assert mask.shape == (BATCH, 1, 2, LENGTH)
    assert mask[0, 0].sum(-1).tolist() == [2, 4]


def test_the_size_is_that_of_the_whole() -> None:
    queries = torch.zeros(BATCH, 4, 2, 8)
    assert size_with_all(queries, asked(EVEN), 2, None) == (BATCH, 4, LENGTH, 8)
    assert size_with_all(queries, asked(EVEN), 2, -2) == LENGTH
    assert size_with_all(queries, asked(EVEN), 2, "numel") == BATCH * 4 * LENGTH * 8
