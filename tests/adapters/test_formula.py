"""W + scaling · B A."""

from __future__ import annotations

import torch

from lora_fx.adapters.factors.lora import folded_weight, low_rank_weight


def test_merged_weight_is_accumulated_in_float32_and_rounded_once():
    torch.manual_seed(0)
    weight = torch.randn(64, 32, dtype=torch.bfloat16)
    A, B = torch.randn(8, 32), torch.randn(64, 8) * 0.01
    exact = weight.double() + 2.0 * (B.double() @ A.double())
    merged = folded_weight(weight, low_rank_weight(A, B, 2.0))
    assert merged.dtype == torch.bfloat16
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((merged.double() - exact).abs() <= 0.5 * ulp + 1e-6).all()


def test_float64_stays_float64():
    A, B = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(low_rank_weight(A, B, 0.5), 0.5 * (B @ A))
