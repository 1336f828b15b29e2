"""How several tensors of a kind become one: sums, and sums of what is left after pruning, by sign or at random.

Sources: TIES, Yadav et al. 2023, arXiv:2306.01708, §3; DARE, Yu et al. 2024, arXiv:2311.03099, §3.1; as in PEFT's
`merge_utils`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Majority = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Blend:
    """A method with what it needs to know."""

    kind: Kind
    density: float = 1.0
    """Share of the values that is kept, 0 to 1."""
    majority: Majority = "total"
    """Whose sign counts: that of the sum, or that of most tensors."""
    generator: torch.Generator | None = None
    """Of what is pruned at random; on the CPU."""

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return Σ weight · tensor of what is kept of tensors of one shape; the arguments stay unchanged.

        With `ties`, only values of the elected sign count, and each entry is their sum divided by their number.
        """
        stacked = torch.stack([self._pruned(tensor) for tensor in tensors])
        shares = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
        weighted = stacked * shares.view(-1, *(1 for _ in tensors[0].shape))
        if self.kind not in ("ties", "dare_ties"):
            return weighted.sum(0)
        elected = stacked.sum(0) if self.majority == "total" else stacked.sign().sum(0)
        mask = stacked.sign() == torch.where(elected >= 0, 1, -1)
        return (weighted * mask).sum(0) / mask.sum(0).clamp(min=1)

    def _pruned(self, tensor: Tensor) -> Tensor:
        if self.kind == "linear" or self.density == 1:
            return tensor
        if self.kind in ("ties", "magnitude_prune"):
            kept = torch.topk(tensor.abs().flatten(), int(self.density * tensor.numel())).indices
            mask = torch.zeros_like(tensor).flatten().index_fill(0, kept, 1).view(tensor.shape)
            return tensor * mask
        chances = torch.full(tensor.shape, self.density)
        mask = torch.bernoulli(chances, generator=self.generator).to(tensor)
        return tensor * mask / self.density


def truncated(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the nearest product of rank r to B A, without forming it: (U Σ, Vᵀ), in float64.

    Args:
        B: [.., out, ranks].
        A: [.., ranks, in].
        r: rank; above that of B A the rest is zero.

    Source: Eckart and Young 1936.
    """
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, S, V = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return _of_rank(left.Q @ U * S.unsqueeze(-2), V @ right.Q.mT, r)


def truncated_matrix(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the nearest product of rank r to a matrix [.., out, in]: (U Σ, Vᵀ), in float64."""
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _of_rank(U * S.unsqueeze(-2), V, r)


def _of_rank(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    there = min(r, B.shape[-1])
    first, second = B.new_zeros(*B.shape[:-1], r), A.new_zeros(*A.shape[:-2], r, A.shape[-1])
    first[..., :there], second[..., :there, :] = B[..., :there], A[..., :there, :]
    return first, second
