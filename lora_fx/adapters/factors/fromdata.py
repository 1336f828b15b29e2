"""First values of A and B from what a layer meets on data; W [out, in] stays unchanged.

eva       A = the r directions in which the inputs of the layer vary most; B = 0
          Paischer et al. 2024, arXiv:2410.07170, §3.2
corda     scaling · B A = the r largest (corda_kpm: smallest) singular parts of W C, times C⁻¹; C = the inputs' X Xᵀ
          Yang et al. 2024, arXiv:2406.05223, §3.2 and §3.3
lora_ga   of the gradient's singular vectors, A = the first r right ones, B = the next r left ones
          Wang et al. 2024, arXiv:2407.05000, §3.2; sizes as in PEFT 0.21: B times its singular values, ∜out / √16
loftq     scaling · B A = the r largest singular parts of W - Q, with Q the quantised weight
          Li et al. 2023, arXiv:2310.08659, §3.2 with one step
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fx.adapters.factors.decompositions import Factors, in_halves, largest_parts

_FEW = 4
"""A randomised SVD pays where fewer than one in so many singular values is wanted."""
_GAMMA = 16.0
_DAMPING, _INVERSE = 0.01, 0.05
"""What is added to a covariance before it is inverted, and how exact the inverse must be; both as in PEFT."""


@dataclass(eq=False)
class Directions:
    """The directions in which rows vary most, from batch after batch: incremental PCA.

    Source: Ross et al. 2008, "Incremental learning for robust visual tracking", §3.1.
    """

    most: int
    """How many directions are kept."""
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: float = 0.0
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Singular values of the centred rows."""
    components: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """[most, in], or fewer while there are fewer rows."""

    def add(self, rows: Tensor) -> None:
        """Take rows [N, in] into account."""
        rows, new, old = rows.float(), len(rows), self.count
        if not new:
            return
        mean = rows.mean(0)
        stacked = rows - mean
        if old:
            between = math.sqrt(old * new / (old + new)) * (self.mean - mean)
            stacked = torch.cat((self.values.unsqueeze(1) * self.components, stacked, between.unsqueeze(0)))
        self.count += new
        self.mean = mean if not old else (self.mean * old + mean * new) / self.count
        self.squares += float(rows.double().square().sum())
        _, self.values, self.components = _largest(stacked, min(self.most, *stacked.shape))

    def shares(self) -> Tensor:
        """Return which share of the rows' variance each direction explains, the largest first."""
        total = self.squares - self.count * float(self.mean.double().square().sum())
        return self.values.double().square() / max(total, torch.finfo(torch.float32).tiny)


def _largest(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    if _FEW * r >= min(matrix.shape):
        left, values, right = largest_parts(matrix, r)
        return left, values, right
    left, values, right = torch.svd_lowrank(matrix, min(2 * r, *matrix.shape), niter=4)
    return left[:, :r], values[:r], right.t()[:r]


@dataclass(eq=False)
class Covariance:
    """X Xᵀ of the inputs of a layer, each call's divided by its largest value, as CorDA's authors do."""

    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Take the rows [N, in] of one call into account."""
        rows = rows.float()
        if not len(rows):
            return
        largest = rows.max().abs()
        rows = rows / (largest if largest > 0 else 1.0)
        self.total = self.total + rows.t() @ rows
        self.count += 1

    def damped(self) -> tuple[Tensor, Tensor]:
        """Return C with a little on its diagonal, and its inverse."""
        matrix = self.total / self.count
        one, damping = torch.eye(len(matrix), device=matrix.device), _DAMPING
        size = matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
        while True:
            raised = matrix + one * (size * damping)
            inverse = torch.linalg.inv(raised)
            if float(torch.dist(raised @ inverse, one)) < _INVERSE:
                return raised, inverse
            damping *= 2


def eva(directions: Directions, r: int, out: int) -> Factors:
    """Return A, the first r directions, and B = 0 [out, r]."""
    A = directions.components[:r].contiguous()
    return A, A.new_zeros(out, r)


def corda(weight: Tensor, inputs: Covariance, r: int, scaling: float, knowledge: bool) -> Factors:
    """Return A and B by the parts of W that matter most for the inputs; with `knowledge`, least."""
    raised, inverse = inputs.damped()
    left, values, right = torch.linalg.svd(weight.float() @ raised, full_matrices=False)
    chosen = slice(-r, None) if knowledge else slice(r)
    roots = (values[chosen] / scaling).sqrt()
    return roots.unsqueeze(1) * (right[chosen] @ inverse), left[:, chosen] * roots


def lora_ga(gradient: Tensor, r: int) -> Factors:
    """Return A and B along the gradient of the weight; draws from torch's global generator."""
    left, values, right = torch.svd_lowrank(gradient.float(), min(4 * r, *gradient.shape), niter=4)
    second = slice(r, 2 * r)
    size = gradient.shape[0] ** 0.25 / math.sqrt(_GAMMA)
    return right.t()[:r].contiguous(), left[:, second] * values[second] * size


def loftq(original: Tensor, quantised: Tensor, r: int, scaling: float) -> Factors:
    """Return A and B of which scaling · B A is the best approximation of what quantising has lost."""
    return in_halves(largest_parts(original.float() - quantised.float(), r), scaling)
