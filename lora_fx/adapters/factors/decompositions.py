"""First values of A and B that are parts of a weight W [out, in]; W stays unchanged.

pissa   scaling · B A = the r largest singular parts of W, each value's root in A and in B
        Meng et al. 2024, arXiv:2404.02948, §3; fast: by Halko's randomised SVD, §4
kasa    scaling · B A = the r smallest singular parts of W, which PEFT's KaSA takes away (Wang et al. 2024,
        arXiv:2412.06071, §3.1)
olora   B A = the first r columns and rows of W = Q R
        Büyükakyüz 2024, arXiv:2406.01775, §2.1; it does not divide by the scaling
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fx.rules.inits import iterations_of

Factors = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r]."""


def decomposed(init: str, weight: Tensor, r: int, scaling: float) -> Factors:
    """Return A and B by the scheme of that name, in float32 (float64 for a float64 weight).

    Args:
        init: one of `rules.inits.DECOMPOSED` or `OF_FILES`, or a fast PiSSA, which draws from torch's global generator.
        weight: [out, in].
        r: at most its smaller side.
        scaling: by which B A will be multiplied; above 0.
    """
    with torch.no_grad():
        wide = weight if weight.dtype == torch.float64 else weight.float()
        if init == "olora":
            q, rest = torch.linalg.qr(wide)
            return rest[:r].contiguous(), q[:, :r].contiguous()
        if init == "kasa":
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
            return in_halves((left[:, -r:], values[-r:], right[-r:]), scaling)
        return in_halves(largest_parts(wide, r, iterations_of(init)), scaling)


def largest_parts(matrix: Tensor, r: int, iterations: int | None = None) -> Sequence[Tensor]:
    """Return U [out, r], S [r] and Vᵀ [r, in] of the r largest singular values, by so many iterations or exactly."""
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :r], values[:r], right[:r]
    left, values, right = torch.svd_lowrank(matrix, r, niter=iterations)
    return left, values, right.t()


def in_halves(parts: Sequence[Tensor], scaling: float) -> Factors:
    """Return A and B of which scaling · B A is U diag(S) Vᵀ, each with the roots of S."""
    left, values, right = parts
    roots = (values / scaling).sqrt()
    return roots.unsqueeze(1) * right, left * roots


WHOLE = 1024
"""Up to this smaller side all singular values are computed, and where more than one in eight is wanted."""
_FEW, _ROUNDS = 8, 8


def leading_values(matrix: Tensor, most: int) -> Tensor:
    """Return the `most` largest singular values, the largest first, in float32 (float64); the same at every call.

    A few of a large matrix come from subspace iterations that begin at fixed numbers, exact to some percent where
    they hardly fall.

    Source: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4.
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    least = min(wide.shape)
    if least <= WHOLE or _FEW * most >= least:
        return _values(wide)[:most]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[1], 2 * most, generator=generator, dtype=wide.dtype).to(wide.device)
    basis = torch.linalg.qr(wide @ start).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.t() @ basis).Q).Q
    return _values(basis.t() @ wide)[:most]


def _values(matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(matrix)
    return values
