"""LoRA: y = W x + b + scaling · B A dropout(x).

Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.adapters.factors.initialise import Kind, fill
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.errors import RefusedError
from lora_fx.models.shards import part_of
from lora_fx.rules.inits import FRESH


class LoRAFactor(nn.Module):
    """One factor of the product B A: `lora_A.<adapter>` [r, in] or `lora_B.<adapter>` [out, r].

    A module of its own, so that graphs show the product node by node and its parameter keeps its key.  The factor A
    carries the `spec`: an attribute of a module that a graph calls survives both pickle and deepcopy, which node and
    graph metadata do not.
    """

    spec: AdapterSpec | None
    of: AdapterSpec | None = None
    """What A and B alike belong to, where they are beside a weight."""

    def __init__(self, weight: Tensor, spec: AdapterSpec | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.__dict__["spec"] = spec  # it is nothing that nn.Module registers

    def forward(self, x: Tensor) -> Tensor:
        """Return weight · x in the weight's dtype; x is [..., columns of the weight]."""
        return F.linear(x if x.dtype == self.weight.dtype else x.to(self.weight.dtype), self.weight)

    def reset_parameters(self) -> None:
        """Give the factor the first values of its rule, in place: for a model that had none when it was adapted.

        Of a sharded one every process calls this, and all get those of the first.

        Raises:
            RefusedError: they are parts of the weight, or made from data.
        """
        if self.of is None or self.weight.is_meta:
            return
        values, init = torch.empty(self.weight.shape, dtype=self.weight.dtype), self.of.lora.init
        if init not in FRESH:
            advice = "adapt a model with values, or load the values of an adapter"
            raise RefusedError(
                "the first values of this adapter are not random", [(self.of.path, f"init {init}")], advice
            )
        kind: Kind = "bank" if self.of.site.is_banked else "embedding" if self.of.site.op == "embedding" else "matrix"
        fill(values, self.spec is not None, init, kind)
        with torch.no_grad():
            self.weight.copy_(part_of(values, self.weight, of_first=True))

    @property
    def matrix(self) -> Tensor:
        """The factor as a matrix: A [r, in], B [out, r]; for a bank of experts one for each, [bank, .., ..]."""
        return self.weight

    @property
    def plain(self) -> Tensor:
        """The factor as files hold it: of moved ones not the matrix, whose parts have been subtracted."""
        return self.weight

    def values_of(self, plain: Tensor) -> Tensor:
        """Return what `weight` holds of a factor as `plain` gives it."""
        return plain

    def extra_repr(self) -> str:
        scaling = "" if self.spec is None else f", scaling={self.spec.scaling:g}"
        inputs, outputs = self._sizes()
        return f"{inputs} → {outputs}{scaling}"

    def _sizes(self) -> tuple[int, int]:
        """Return the columns and rows of the matrix."""
        return self.weight.shape[-1], self.weight.shape[-2]


TensorMap = Callable[[Tensor], Tensor]


def add_low_rank(
    base: Tensor,
    x: Tensor,
    A: TensorMap,
    B: TensorMap,
    dropout: TensorMap | None,
    magnitude: Callable[[Tensor, Tensor], Tensor] | None,
    scaling: float,
    mixed: bool,
    one_hot: bool = False,
) -> Tensor:
    """Return base + scaling · B A dropout(x); the only place where this formula is written.

    The scaling is applied to the r columns of A x, not to the out columns of the result: the same product, r/out of
    the work.  With B = 0 the result equals `base` bit by bit.

    Args:
        base: the base layer's output, [..., out].
        x: the base layer's input, [..., in].
        A: the map by lora_A, [..., in] → [..., r].
        B: the map by lora_B, [..., r] → [..., out].
        dropout: applied to x before A; None for none.  With `one_hot`, to what A makes of x.
        magnitude: DoRA's map from (base, delta) to the output; None for plain LoRA, which adds them.
        scaling: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; no unit.
        mixed: whether the adapter's dtype differs from the base's (float32 adapters on a half-precision base); the
            delta is then rounded once, to the dtype of `base`.
        one_hot: whether x are ids, which stand for one-hot vectors.
    """
    inner = A(x if dropout is None or one_hot else dropout(x))
    if one_hot and dropout is not None:
        inner = dropout(inner)
    delta = B(inner * scaling)
    if mixed:
        delta = delta.type_as(base)
    return base + delta if magnitude is None else magnitude(base, delta)


def as_rows(weight: Any, layout: str) -> Any:
    """Return the weight, a tensor or a proxy, as [out, in]."""
    return weight if layout == "out_in" else weight.t()


def low_rank_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ΔW = scaling · B A, [out, in], in float32 (float64 for float64 factors); the arguments stay unchanged."""
    wide = torch.float64 if lora_A.dtype == torch.float64 else torch.float32
    return (lora_B.to(wide) @ lora_A.to(wide)) * scaling


def wide_sum(weight: Tensor, delta: Tensor) -> Tensor:
    """Return W + ΔW in the wider dtype of the two, not rounded; the arguments stay unchanged.

    `low_rank_weight` gives ΔW in float32 or float64, so the sum is accumulated there.

    Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3; scaling: Kalajdzievski 2023, arXiv:2312.03732.
    """
    wide = torch.promote_types(delta.dtype, weight.dtype)
    return weight.to(wide) + delta.to(wide)


def folded_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """Return W + ΔW, rounded once to W's dtype, a new tensor; the arguments stay unchanged."""
    return wide_sum(weight, delta).to(weight.dtype)
