"""Codes of a weight on a grid that is given, chosen by what its layer is given: GPTQ's rounding.

Rounding column after column, the error of one is made up for by the columns that come after it, as far as the inputs
make them alike: what counts is ‖(Q - W) X‖, not ‖Q - W‖.  A change that is smaller than half a step of the grid, of
which the nearest codes have nothing, so comes to be in the outputs wherever the inputs do not vary in all directions.

Source: Frantar et al. 2022, arXiv:2210.17323, §3.3 (order by the diagonal, blocks of columns, Cholesky form).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fx.models.grids import Grid

_DAMPING = 0.01
"""Of the mean square of the inputs, what is added to each direction's; as in GPTQ."""
_BLOCK = 128


@dataclass(eq=False)
class Moment:
    """X Xᵀ of the inputs of a layer, [in, in]."""

    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Take rows [N, in] into account."""
        rows = rows.float()
        self.total = self.total + rows.t() @ rows
        self.count += len(rows)

    def square(self, change: Tensor) -> float:
        """Return ‖change X‖² of a change [out, in] of the weight."""
        return float(((change @ self.total) * change).double().sum().clamp_min(0))

    def size(self, change: Tensor) -> float:
        """Return ‖change X‖ of a change [out, in] of the weight."""
        return math.sqrt(self.square(change))


class Prepared(NamedTuple):
    """What inputs say of columns: in which order they are rounded, and what a miss of one means for later ones."""

    order: Tensor
    later: Tensor


def prepared(inputs: Moment) -> Prepared:
    """Return what `chosen_codes` needs of inputs, which stay unchanged; two more matrices [in, in] are there meanwhile.

    Raises:
        ValueError: no inputs have such a moment.
    """
    squares = inputs.total.diagonal()
    order = squares.argsort(descending=True)
    matrix = inputs.total[order[:, None], order]
    matrix.diagonal().add_(_DAMPING * squares.mean().clamp_min(torch.finfo(matrix.dtype).tiny))
    matrix = torch.cholesky_inverse(_cholesky(matrix))
    return Prepared(order, _cholesky(matrix, upper=True))


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    made: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(matrix, upper=upper)
    if int(made[1]):
        raise ValueError("no inputs have such a moment: it is not positive definite")
    return made[0]


def guided_codes(target: Tensor, grid: Grid, inputs: Moment) -> Tensor:
    """Return codes [out, in], as float32, whose values give nearly what the target [out, in] gives on such inputs.

    Target, grid and inputs stay unchanged.
    """
    return chosen_codes(target, grid, prepared(inputs))


def chosen_codes(target: Tensor, grid: Grid, inputs: Prepared) -> Tensor:
    """Return what `guided_codes` does, row by row, of what inputs say."""
    order, later = inputs
    left, ordered = target.float()[:, order], grid.part(order)
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        own = later[block, block]
        codes[:, block], errors = _rounded(left[:, block], ordered.part(block), own)
        left[:, start + _BLOCK :] -= errors @ later[block, start + _BLOCK :]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def _rounded(left: Tensor, grid: Grid, later: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of some columns, and by how much each was missed, over its place on the diagonal."""
    left, codes, errors = left.clone(), torch.empty_like(left), torch.empty_like(left)
    for column in range(left.shape[1]):
        one = grid.part(slice(column, column + 1))
        codes[:, column] = one.nearest(left[:, column, None]).squeeze(1)
        missed = (left[:, column] - one.values(codes[:, column, None]).squeeze(1)) / later[column, column]
        left[:, column:] -= missed.unsqueeze(1) * later[column, column:]
        errors[:, column] = missed
    return codes, errors
