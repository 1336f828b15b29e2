"""The factors A and B of layers that are not plain linears: convolutions, embeddings, and linears with parts.

Each keeps its values in the shape that PEFT gives them, and gives the plain matrix as `matrix`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.rules.ruleset import as_runs

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class FilterFactor(LoRAFactor):
    """A factor of a convolution, held as filters [out, in, …]."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.flatten(1)

    def _sizes(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return columns, rows


class ConvolutionA(FilterFactor):
    """A of a convolution: r filters [r, in / groups, kernel…], which every group of channels meets.

    Stride, padding, its mode and dilation are the base layer's.
    """

    def __init__(self, weight: Tensor, spec: AdapterSpec, base: Convolution) -> None:
        super().__init__(weight, spec)
        self.stride, self.dilation, self.groups = base.stride, base.dilation, base.groups
        self.mode: str = base.padding_mode
        self.padding: Any = base.padding if self.mode == "zeros" else 0
        self.border: list[int] = base._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        """Return the r filters' answers, [.., groups · r, …], in the factor's dtype."""
        x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        if self.mode != "zeros":
            x = F.pad(x, self.border, mode=self.mode)
        convolve = _CONVOLVE[self.weight.dim() - 2]
        return convolve(x, self.filters, None, self.stride, self.padding, self.dilation, self.groups)

    @property
    def filters(self) -> Tensor:
        """The filters of all groups, [groups · r, in / groups, kernel…]."""
        weight: Tensor = self.weight
        return weight if self.groups == 1 else weight.repeat(self.groups, *(1 for _ in weight.shape[1:]))


class ConvolutionB(FilterFactor):
    """B of a convolution: [out, r, 1…]."""

    def __init__(self, weight: Tensor, groups: int) -> None:
        super().__init__(weight)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return _CONVOLVE[self.weight.dim() - 2](x, self.weight, None, 1, 0, 1, self.groups)


class EmbeddingA(LoRAFactor):
    """A of an embedding: [r, num_embeddings]; the ids pick its columns.

    Padding, and whether gradients are divided by how often an id occurs, are the base layer's.
    """

    def __init__(self, weight: Tensor, spec: AdapterSpec, base: nn.Embedding) -> None:
        super().__init__(weight, spec)
        self.padding_idx, self.scale_grad_by_freq = base.padding_idx, base.scale_grad_by_freq

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class TokenDropout(nn.Dropout):
    """Dropout on the input of an embedding: a token is one-hot, so it is dropped as a whole or not at all."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what A makes of the tokens, [.., r], with all values of a dropped token zero."""
        return input * super().forward(torch.ones_like(input[..., :1]))


class SlicedB(LoRAFactor):
    """B of a weight with parts, of which some are adapted: each part has r columns of its own, and rows of its own.

    `weight` [rows of the adapted parts, r] holds the blocks; the whole matrix [out, parts · r] has zeros elsewhere.  A
    bank of experts has one such weight for each.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor, out_features: int, parts: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(weight)
        self.out_features, self.parts = out_features, len(parts)
        rows, columns = _places(parts)
        self.register_buffer("rows", rows.to(weight.device), persistent=False)
        self.register_buffer("columns", columns.to(weight.device), persistent=False)
        self.runs = as_runs(parts)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.of is not None and not self.rows.is_meta:
            for own, values in zip((self.rows, self.columns), _places(self.of.parts), strict=True):
                own.copy_(values)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return B x; without x, B as a whole."""
        matrix = self.matrix
        if x is None:
            return matrix
        return F.linear(x if x.dtype == matrix.dtype else x.to(matrix.dtype), matrix)

    @property
    def plain(self) -> Tensor:
        return self.matrix

    @property
    def matrix(self) -> Tensor:
        *bank, _, r = self.weight.shape
        whole = self.weight.new_zeros(*bank, self.out_features, self.parts, r)
        members = [torch.arange(number, device=whole.device)[:, None] for number in bank]
        return whole.index_put((*members, self.rows, self.columns), self.weight).flatten(-2)

    def values_of(self, plain: Tensor) -> Tensor:
        """Return the blocks of a whole matrix, as `weight` holds them."""
        r, plain = self.weight.shape[-1], plain.to(self.rows.device)
        blocks: Tensor = plain.reshape(*plain.shape[:-1], self.parts, r)[..., self.rows, self.columns, :]
        return blocks


class SharedFactor(LoRAFactor):
    """A factor that all matrices of a bank have together: `weight` [1, rows, columns] stands for each of them."""

    def __init__(self, weight: Tensor, members: int, spec: AdapterSpec | None = None) -> None:
        super().__init__(weight, spec)
        self.members = members

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return the factor as a whole, [bank, rows, columns]: in graphs of code that reads the bank."""
        if x is not None:
            raise TypeError("a factor of a bank is not called on an input")
        return self.matrix

    @property
    def matrix(self) -> Tensor:
        whole: Tensor = self.weight.expand(self.members, -1, -1)
        return whole

    @property
    def plain(self) -> Tensor:
        return self.matrix

    def values_of(self, plain: Tensor) -> Tensor:
        """Return the first of equal matrices."""
        return plain[:1]


def _places(parts: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """Return the row of each row of the blocks, and the number of its part."""
    rows = [row for part in parts for row in part]
    return torch.tensor(rows), torch.tensor([number for number, part in enumerate(parts) for _ in part])


class CallFactors(nn.ModuleList):
    """The factors of a module that is called several times, one for each call."""
