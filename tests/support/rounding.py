"""How far two sums of the same numbers may lie apart when they are added in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_same_sums(actual: Sequence[Tensor], expected: Sequence[Tensor], additions: int) -> None:
    """Assert that the gradients of one loss are the same but for the order of so many additions in each entry.

    Adding n numbers in any order is off by at most n · eps · Σ |number| (Higham, Accuracy and Stability of Numerical
    Algorithms, §4.2).  The largest entry of all gradients stands for that sum, as an entry's own numbers may cancel.
    """
    largest = max(gradient.abs().max().item() for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=additions * torch.finfo(other.dtype).eps * largest)
