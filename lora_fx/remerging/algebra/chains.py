"""Sums of matrix chains: x · M₁ · M₂ ··· s + x · N₁ ··· t + c, the form in which a LoRA is seen by its structure.

Everything is written for rows, x · M, so an nn.Linear's weight stands here transposed.  Factors are views of the
parameters as they are: what is folded later is accumulated from them in float32 and rounded once.

Worked example: `linear(x) + 0.5 * B(A(x))`, the stored weights W [8, 4], A [2, 4] and B [8, 2], as functions of x::

    x               Affine(linear = (1.0 ·,))                       the identity: a chain without factors; width 4
    linear(x)       Affine(linear = (1.0 · Wᵀ,))                    width 8; Wᵀ.part = WeightPart("linear.weight",
                                                                    transposed=True, start=0, stop=8)
    A(x)            Affine(linear = (1.0 · Aᵀ,))                    width 2
    0.5 * B(A(x))   Affine(linear = (0.5 · Aᵀ · Bᵀ,))               `is_low_rank`: rank 2 < max(4, 8)
    the sum         Affine(linear = (1.0 · Wᵀ, 0.5 · Aᵀ · Bᵀ))      one whole stored weight and a product

`delta()` of the second chain is 0.5 · B A [8, 4], and `with_chains(W, [it])` is W + 0.5 · B A.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fx.adapters.factors.lora import low_rank_weight


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Which columns, start to stop, of which stored tensor a factor is; `transposed` if that is stored as [out, in]."""

    name: str
    transposed: bool
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A constant matrix: a view of one parameter, or something made of parameters without a product."""

    tensor: Tensor
    names: frozenset[str]
    part: WeightPart | None = None

    def transposed(self) -> "Factor":
        """Return the factor [columns, rows]; columns of a stored matrix become rows of it, which are not a part."""
        part = self.part
        if part is not None and (part.start, part.stop) == (0, self.tensor.shape[1]):
            part = WeightPart(part.name, not part.transposed, 0, self.tensor.shape[0])
        else:
            part = None
        return Factor(self.tensor.t(), self.names, part)

    def columns(self, start: int, stop: int) -> "Factor":
        """Return the columns start to stop, a view."""
        part = self.part
        if part is not None:
            part = replace(part, start=part.start + start, stop=part.start + stop)
        return Factor(self.tensor[:, start:stop], self.names, part)

    def flattened(self) -> "Factor":
        """Return the factor with all of its dimensions but the first as columns."""
        return Factor(self.tensor.flatten(1), self.names, self.part)

    @property
    def key(self) -> object:
        """Equal for factors that are the same values by construction."""
        return self.part or (self.names, id(self.tensor))


@dataclass(frozen=True, slots=True)
class MatrixChain:
    """coefficient · F₁ · F₂ ··· ; no factors: the identity."""

    coefficient: float
    factors: tuple[Factor, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return tuple(factor.key for factor in self.factors)

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(factor.names for factor in self.factors))

    @property
    def rank(self) -> int:
        """The smallest dimension between two factors."""
        return min(factor.tensor.shape[0] for factor in self.factors[1:])

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a product through fewer dimensions than it has rows, or columns: it is added to a matrix that
        has room for it, whatever its rank; the LoRA of a head with four outputs may well have rank four.
        """
        return len(self.factors) > 1 and self.rank < max(self.factors[0].tensor.shape[0], self.columns)

    @property
    def columns(self) -> int:
        return self.factors[-1].tensor.shape[1]

    @property
    def part(self) -> WeightPart | None:
        """What it is a part of, if it is nothing but columns of one stored matrix."""
        return self.factors[0].part if len(self.factors) == 1 and self.coefficient == 1.0 else None

    def scaled(self, number: float) -> "MatrixChain":
        return MatrixChain(self.coefficient * number, self.factors)

    def delta(self) -> Tensor:
        """Return the chain's matrix as nn.Linear stores it, [columns, rows], in float32 (float64 for float64)."""
        if len(self.factors) == 1:
            only = self.factors[0].tensor.t()
            return only.to(_wide(only)) * self.coefficient
        first, *rest = (factor.tensor for factor in self.factors)
        last = functools.reduce(lambda left, right: left.to(_wide(left)) @ right.to(_wide(left)), rest)
        return low_rank_weight(first.t(), last.t(), self.coefficient)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


Chains = tuple[MatrixChain, ...]


def simplified(chains: Iterable[MatrixChain]) -> Chains:
    """Return the sum with equal chains put together; those that cancel (W + B A - W) are gone."""
    total: dict[object, MatrixChain] = {}
    for chain in chains:
        known = total.get(chain.key)
        total[chain.key] = chain if known is None else MatrixChain(known.coefficient + chain.coefficient, chain.factors)
    return tuple(chain for chain in total.values() if chain.coefficient != 0.0)


def product(left: Chains, right: Chains) -> Chains:
    """Return the product of two sums of chains: every chain of the one times every chain of the other."""
    return simplified(MatrixChain(a.coefficient * b.coefficient, a.factors + b.factors) for a in left for b in right)


def with_chains(weight: Tensor, chains: Iterable[MatrixChain], start: int = 0) -> Tensor:
    """Return weight + Σ chains, a new tensor; the arguments stay unchanged.

    W' = W + Σ scaling · B A, accumulated in float32 (float64 where W or a factor is) and rounded once to W's dtype.

    Args:
        weight: [out, in] as nn.Linear stores it.
        chains: each with `in` rows and as many columns as rows of the weight are changed.
        start: the first row that is changed.
    """
    total = weight.detach().to(_wide(weight)).clone()
    with torch.no_grad():
        for chain in chains:
            delta = chain.delta()
            total = total.to(torch.promote_types(total.dtype, delta.dtype))
            total[start : start + delta.shape[0]] += delta
    return total.to(weight.dtype)


def refolded(stored: Tensor, transposed: bool, chains: Iterable[MatrixChain], start: int = 0) -> Tensor:
    """Return `with_chains` of a weight that is stored as [out, in] if `transposed`, else as [in, out]; in the shape
    that is stored.
    """
    weight = stored.flatten(1) if stored.dim() > 2 else stored
    if transposed:
        return with_chains(weight, chains, start).view(stored.shape)
    return with_chains(weight.t(), chains, start).t().contiguous().view(stored.shape)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A constant of a graph: a sum of chains, [rows, columns]; a single factor may have any number of dimensions.

    `shape` may have ones in front of the two dimensions of a product (what conv1d gives).
    """

    chains: Chains
    shape: tuple[int, ...]

    @property
    def single(self) -> Factor | None:
        """The only factor, if the value is nothing else."""
        if len(self.chains) == 1 and len(self.chains[0].factors) == 1 and self.chains[0].coefficient == 1.0:
            return self.chains[0].factors[0]
        return None

    @property
    def is_plain(self) -> bool:
        """Whether it is a matrix: two dimensions, no more in front."""
        return len(self.shape) == 2

    @property
    def names(self) -> frozenset[str]:
        """Names of the stored tensors that it is made of."""
        return frozenset().union(*(chain.names for chain in self.chains))

    def scaled(self, number: float) -> "Matrix":
        """Return the constant times a number, which the coefficients take up."""
        return Matrix(tuple(chain.scaled(number) for chain in self.chains), self.shape)

    def transposed(self) -> "Matrix":
        """Return the plain constant [columns, rows]: (M N)ᵀ = Nᵀ Mᵀ in every chain."""
        turned = (
            MatrixChain(chain.coefficient, tuple(factor.transposed() for factor in reversed(chain.factors)))
            for chain in self.chains
        )
        return Matrix(tuple(turned), (self.shape[1], self.shape[0]))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether all chains are matrices that lie in memory as a tensor of this shape, first its rows."""
        sizes = {(chain.factors[0].tensor.shape[0], chain.columns) for chain in self.chains}
        flat = all(factor.tensor.dim() == 2 for chain in self.chains for factor in chain.factors)
        return flat and sizes == {(shape[0], math.prod(shape[1:]))}

    def flattened(self) -> "Matrix | None":
        """Return the constant as a matrix, all of its dimensions but the first as columns; None if it is not one."""
        if len(self.shape) < 2:
            return None
        chains = tuple(
            replace(chain, factors=(chain.factors[0].flattened(),)) if len(chain.factors) == 1 else chain
            for chain in self.chains
        )
        flat = Matrix(chains, (self.shape[0], math.prod(self.shape[1:])))
        return flat if flat.fits(flat.shape) else None

    def columns(self, start: int, stop: int) -> "Matrix":
        """Return the columns start to stop: those of the last factor of every chain."""
        return Matrix(tuple(_columns(chain, start, stop) for chain in self.chains), (self.shape[0], stop - start))


def matrix(tensor: Tensor, names: Iterable[str], part: WeightPart | None = None) -> Matrix:
    """Return a constant that is one factor."""
    return Matrix((MatrixChain(1.0, (Factor(tensor, frozenset(names), part),)),), tuple(tensor.shape))


def _columns(chain: MatrixChain, start: int, stop: int) -> MatrixChain:
    return MatrixChain(chain.coefficient, (*chain.factors[:-1], chain.factors[-1].columns(start, stop)))


def _placed(chain: MatrixChain, start: int, total: int) -> MatrixChain:
    """Return the chain with columns of zeros around its own."""
    last = chain.factors[-1]
    after = total - start - last.tensor.shape[1]
    padded = torch.nn.functional.pad(last.tensor.detach(), (start, after))
    return MatrixChain(chain.coefficient, (*chain.factors[:-1], Factor(padded, last.names)))


def _at_each_of(chain: MatrixChain, positions: int) -> MatrixChain:
    def spread(factor: Factor) -> Factor:
        matrix = factor.tensor.detach().contiguous()
        return Factor(torch.kron(matrix, torch.eye(positions).to(matrix)), factor.names)

    return MatrixChain(chain.coefficient, tuple(map(spread, chain.factors)))


def side_by_side(matrices: list[Matrix]) -> Matrix:
    """Return the constants one beside the other, as columns."""
    total, start, chains = sum(part.shape[1] for part in matrices), 0, []
    for part in matrices:
        chains += [_placed(chain, start, total) for chain in part.chains]
        start += part.shape[1]
    return Matrix(_joined(matrices, tuple(chains)), (matrices[0].shape[0], total))


def _joined(matrices: list[Matrix], chains: Chains) -> Chains:
    """Return single factors side by side as one factor: stacked weights are one matrix again."""
    singles = [single for part in matrices if (single := part.single) is not None]
    if len(singles) < len(matrices):
        return chains
    tensor = torch.cat([single.tensor.detach() for single in singles], dim=1)
    return (MatrixChain(1.0, (Factor(tensor, frozenset().union(*(single.names for single in singles))),)),)


@dataclass(frozen=True, slots=True)
class Affine:
    """A value of a graph in terms of one other: x · Σ linear + Σ constant, for each row of x."""

    linear: Chains
    constant: Chains
    """Rows: their first factor is [1, n]."""
    width: int
    rows: object
    """The dimensions in front of the last one; equal ones are equal dimensions."""

    @staticmethod
    def identity(width: int, rows: object) -> "Affine":
        """Return x itself."""
        return Affine((MatrixChain(1.0, ()),), (), width, rows)

    def plus(self, other: "Affine") -> "Affine":
        """Return the sum of two values of the same rows and width."""
        linear, constant = (*self.linear, *other.linear), (*self.constant, *other.constant)
        return replace(self, linear=simplified(linear), constant=simplified(constant))

    def scaled(self, number: float) -> "Affine":
        return self._changed(lambda chain: chain.scaled(number), self.width)

    def times(self, other: Matrix) -> "Affine":
        """Return the value times a constant [width, columns]."""
        linear, constant = product(self.linear, other.chains), product(self.constant, other.chains)
        return Affine(linear, constant, other.shape[1], self.rows)

    def shifted(self, row: Matrix) -> "Affine":
        """Return the value with a row [1, width] added to every row."""
        return replace(self, constant=simplified((*self.constant, *row.chains)))

    def at_each_of(self, positions: int) -> "Affine":
        """Return the linear part at each position of a patch, the positions of one column beside each other."""
        return self._changed(lambda chain: _at_each_of(chain, positions), self.width * positions)

    def columns(self, start: int, stop: int) -> "Affine":
        """Return the columns start to stop of the value."""
        if all(chain.factors for chain in self.linear):
            return self._changed(lambda chain: _columns(chain, start, stop), stop - start)
        return self.times(matrix(torch.eye(self.width)[:, start:stop], ()))  # x itself gives its columns by a factor

    def placed(self, start: int, total: int) -> "Affine":
        """Return the value as columns from `start` on of one of `total` columns, zero elsewhere."""
        return self._changed(lambda chain: _placed(chain, start, total), total)

    def _changed(self, change: Callable[[MatrixChain], MatrixChain], width: int) -> "Affine":
        linear, constant = (tuple(map(change, chains)) for chains in (self.linear, self.constant))
        return Affine(linear, constant, width, self.rows)

    def parts(self) -> Iterator[tuple[MatrixChain, WeightPart]]:
        """Yield the linear chains that are columns of one stored matrix."""
        for chain in self.linear:
            if chain.part is not None:
                yield chain, chain.part
