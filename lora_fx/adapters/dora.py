"""DoRA: each row of W + scaling · B A keeps a length of its own, which is trained.

W' = m · V / ‖V‖, V = W + scaling · B A, with m [out] and ‖·‖ the 2-norm of each row.
Source: Liu et al. 2024, arXiv:2402.09353, §4.1 eq. 5; the norm counts as a constant for gradients, §4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_fx.adapters.lora import low_rank_weight
from lora_fx.quantised import dense


class DoRAMagnitude(nn.Module):
    """The lengths m: `lora_magnitude_vector.<adapter>.weight` [out]."""

    def __init__(self, weight: Tensor, scaling: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.scaling = scaling

    def forward(
        self, base: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
    ) -> Tensor:
        """Return m/‖V‖ · (W x + delta) + bias, given base = W x + bias and delta = scaling · B A x.

        Written so that it equals `base` bit by bit while B = 0 and m = ‖W‖.  Dropout reaches `delta` alone.
        """
        scale = (self.weight / row_norms(weight, lora_A, lora_B, self.scaling).to(self.weight.dtype)).to(base.dtype)
        plain = base if bias is None else base - bias
        return base + (scale - 1) * plain + scale * delta

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}"


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ‖W + scaling · B A‖ for each row, [out], without gradient."""
    with torch.no_grad():
        delta, weight = low_rank_weight(lora_A, lora_B, scaling), dense(weight)
        wide = torch.promote_types(delta.dtype, weight.dtype)
        norms: Tensor = torch.linalg.vector_norm(weight.to(wide) + delta.to(wide), dim=1)
        return norms


def merged_dora_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """Return m · V / ‖V‖ in W's dtype, a new tensor; accumulated in float32 and rounded once."""
    delta = low_rank_weight(lora_A, lora_B, scaling)
    wide = torch.promote_types(delta.dtype, weight.dtype)
    directions = weight.to(wide) + delta.to(wide)
    norms = row_norms(weight, lora_A, lora_B, scaling).to(wide)
    return (directions * (magnitude.to(wide) / norms).unsqueeze(1)).to(weight.dtype)
