"""For the tests of what stands around a model."""

from __future__ import annotations

import functools

import torch

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
"""Results in float32 of a few short sums, near 1: some hundred roundings."""
