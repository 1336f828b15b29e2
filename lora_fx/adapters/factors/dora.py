"""DoRA: each row of W + scaling · B A keeps a length of its own, which is trained.

W' = m · V / ‖V‖, V = W + scaling · B A, with m [out] and ‖·‖ the 2-norm of each row.
Source: Liu et al. 2024, arXiv:2402.09353, §4.1 eq. 5; the norm counts as a constant for gradients, §4.3.
"""

import torch
from torch import Tensor, nn

from lora_fx.adapters.factors.lora import low_rank_weight, wide_sum
from lora_fx.models.quantised import dense


class DoRAMagnitude(nn.Module):
    """The lengths m: `lora_magnitude_vector.<adapter>.weight` [out]."""

    def __init__(self, weight: Tensor, scaling: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.scaling = scaling

    def forward(
        self,
        base: Tensor,
        delta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        onto: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """Return m/‖V‖ · (W x + delta) + bias, given base = W x + bias and delta = scaling · B A x.

        Written so that it equals `base` bit by bit while B = 0 and m = ‖W‖.  Dropout reaches `delta` alone.  Beside
        other adapters, `share` times what it adds to `base` is added to what they have made of it, `onto`.
        """
        scale = self.scale(weight, lora_A, lora_B).to(base.dtype)
        plain = base if bias is None else base - bias
        if onto is None:
            return base + (scale - 1) * plain + scale * delta
        return onto + share * ((scale - 1) * plain + scale * delta)

    def scale(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Return m/‖V‖ [out] for a weight [out, in]."""
        return stretch(self.weight, row_norms_factored(weight, lora_A, lora_B, self.scaling))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}"


def stretch(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return m/‖V‖ in m's dtype; 0 rather than 0/0 for a row of zeros, which stays one."""
    norms = norms.to(magnitude.dtype)
    return magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def row_norms_factored(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ‖W + scaling · B A‖ for each row, [out], without gradient, and without the sum as a whole.

    ‖V‖² = ‖W‖² + 2 scaling · Σ (W Aᵀ ⊙ B) + scaling² · Σ (B (A Aᵀ) ⊙ B), each Σ over a row.  For B = 0 it is ‖W‖ as
    `row_norms` gives it, bit by bit.  Where V nearly cancels W, it is as exact as W's own length; it is never so small
    that it is nothing but rounding, and in particular not 0 then.
    """
    with torch.no_grad():
        wide = torch.promote_types(torch.float32, lora_A.dtype)
        W, A, B = dense(weight).to(wide), lora_A.to(wide), lora_B.to(wide)
        lengths: Tensor = torch.linalg.vector_norm(W, dim=1)
        cross = ((W @ A.t()) * B).sum(1).mul_(2 * scaling)
        added = ((B @ (A @ A.t())) * B).sum(1).mul_(scaling * scaling).add_(cross)
        grown = lengths * (1 + added / lengths.square()).clamp_(min=torch.finfo(wide).eps).sqrt_()
        return torch.where(lengths > 0, grown, added.clamp(min=0).sqrt_())


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ‖W + scaling · B A‖ for each row, [out], without gradient."""
    with torch.no_grad():
        delta, weight = low_rank_weight(lora_A, lora_B, scaling), dense(weight)
        norms: Tensor = torch.linalg.vector_norm(wide_sum(weight, delta), dim=1)
        return norms


def merged_dora_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """Return m · V / ‖V‖ in W's dtype, a new tensor; accumulated in float32 and rounded once."""
    directions = wide_sum(weight, low_rank_weight(lora_A, lora_B, scaling))
    norms = torch.linalg.vector_norm(directions, dim=1)
    return (directions * stretch(magnitude.to(directions.dtype), norms).unsqueeze(1)).to(weight.dtype)
