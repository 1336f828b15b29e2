"""The tolerance for sums in another order: it lets rounding pass, and nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.support.rounding import assert_same_sums


def test_sums_in_another_order_pass():
    terms = torch.randn(100, 50)
    assert_same_sums([terms.sum(0)], [terms.flip(0).sum(0)], additions=100)


def test_a_term_that_is_missing_does_not():
    terms = torch.randn(100, 50)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_sums([terms[:-1].sum(0)], [terms.sum(0)], additions=100)
