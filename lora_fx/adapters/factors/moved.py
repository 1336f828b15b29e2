"""Factors that start away from zero, as parts of the weight do: y = W x + b + scaling · (B A - B₀ A₀) dropout(x).

PiSSA and its kin train B A in place of the part B₀ A₀ of W, and change the base to W - scaling · B₀ A₀.  Here the base
stays as it is, and what is added is one product of rank 2r:

    B A - B₀ A₀  =  B (A - A₀) + (B - B₀) A₀  =  [B, B - B₀] · [A - A₀; A₀]

While A = A₀ and B = B₀ it is exactly 0, so that an adapted model starts at its base bit by bit; and a change that is
small beside B₀ A₀ is not rounded as B A is.  Gradients of A and B are those that PiSSA has.
Files hold [B, -B₀] · [A; A₀], a plain LoRA of rank 2r for the base itself, from which all four come back as they were.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.adapters.factors.spec import AdapterSpec


class MovedFactor(LoRAFactor):
    """A factor and the values at which it started: `weight` is trained, the buffer `start` stays."""

    start: Tensor

    def __init__(self, weight: Tensor, spec: AdapterSpec | None = None) -> None:
        super().__init__(weight, spec)
        self.register_buffer("start", torch.zeros_like(weight))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return matrix · x in the matrix's dtype; without x, the matrix."""
        matrix = self.matrix
        if x is None:
            return matrix
        return F.linear(x if x.dtype == matrix.dtype else x.to(matrix.dtype), matrix)

    def begin(self, values: Tensor) -> None:
        """Start at these values, in place."""
        with torch.no_grad():
            self.start.copy_(values)
            self.weight.copy_(values)


class MovedA(MovedFactor):
    """A of a moved adapter: the matrix is [A - A₀; A₀], [2r, in]."""

    @property
    def matrix(self) -> Tensor:
        return torch.cat((self.weight - self.start, self.start))

    @property
    def plain(self) -> Tensor:
        return torch.cat((self.weight, self.start))

    def _sizes(self) -> tuple[int, int]:
        r, inputs = self.weight.shape
        return inputs, 2 * r


class MovedB(MovedFactor):
    """B of a moved adapter: the matrix is [B, B - B₀], [out, 2r]."""

    @property
    def matrix(self) -> Tensor:
        return torch.cat((self.weight, self.weight - self.start), dim=1)

    @property
    def plain(self) -> Tensor:
        return torch.cat((self.weight, -self.start), dim=1)

    def _sizes(self) -> tuple[int, int]:
        outputs, r = self.weight.shape
        return 2 * r, outputs


def take_plain(A: MovedFactor, B: MovedFactor, first: Tensor, second: Tensor) -> None:
    """Take what two factors have as `plain`, in place; of r ranks alone, A and B themselves."""
    r = A.weight.shape[0]
    with torch.no_grad():
        A.weight.copy_(first[:r])
        B.weight.copy_(second[:, :r])
        if first.shape[0] > r:
            A.start.copy_(first[r:])
            B.start.copy_(-second[:, r:])
