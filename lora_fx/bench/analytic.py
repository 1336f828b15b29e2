"""How many FLOPs a step of one LoRA linear takes, by formula; a multiplication with its addition is two.

Y = X Wᵀ + s · (X Aᵀ) Bᵀ with X [N, m], W [n, m] frozen, A [r, m], B [n, r].  Either
the factors are kept apart, or W + s · B A is formed and used instead (orders: RunLoRA, arXiv:2312.03415).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of the two passes."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer in a step: its sizes, the rows that it is called with, its adapter's rank."""

    rows: int
    """N: tokens, or positions."""
    inputs: int
    """m."""
    outputs: int
    """n."""
    rank: int = 0
    """r."""

    def base(self, input_gradient: bool = True) -> Flops:
        """Return the FLOPs of the frozen layer: 2Nmn, and 2Nmn for the gradient of its input."""
        product = 2 * self.rows * self.inputs * self.outputs
        return Flops(product, product if input_gradient else 0)

    def adapter(self, input_gradient: bool = True) -> Flops:
        """Return what the adapter adds where its factors are kept apart and X Aᵀ is saved.

        Forward 2Nmr (X Aᵀ) + 2Nnr (its product with Bᵀ); backward 2Nnr (Z = dY B), 2Nnr (dB), 2Nmr (dA) and, for the
        gradient of the input, 2Nmr (Z A).
        """
        first = 2 * self.rows * self.inputs * self.rank
        second = 2 * self.rows * self.outputs * self.rank
        return Flops(first + second, 2 * second + first + (first if input_gradient else 0))

    def factored(self, input_gradient: bool = True) -> Flops:
        """Return the FLOPs of the layer with its adapter, the factors kept apart."""
        return self.base(input_gradient) + self.adapter(input_gradient)

    def merged(self, input_gradient: bool = True, rebuilt: bool = False) -> Flops:
        """Return the FLOPs of the layer with W + s · B A in place of W.

        Forward 2Nmn + 2mnr; backward 2Nmn for the gradient of the input, 2Nnr (Z = dY B), 2Nmr (dA), 2Nmr (X Aᵀ, which
        the forward did not need) and 2Nnr (dB).

        Args:
            input_gradient: whether the input requires a gradient.
            rebuilt: whether the sum is formed again in the backward pass instead of kept: 2mnr more, where the gradient
                of the input needs it.
        """
        base = self.base(input_gradient)
        forming = 2 * self.inputs * self.outputs * self.rank
        factors = 4 * self.rows * (self.inputs + self.outputs) * self.rank
        again = forming if rebuilt and input_gradient else 0
        return base + Flops(forming, factors + again)
