"""First values of A and B.  All but `random` start with B = 0, so that an adapted model equals its base bit by bit."""

import contextlib
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["matrix", "bank", "embedding"]


def initialise(lora_A: Tensor, lora_B: Tensor, init: str, kind: Kind = "matrix") -> None:
    """Fill both factors in place with the scheme named `init` (one of `rules.INITS`), from torch's global generator.

    Args:
        lora_A: [r, in], a convolution's [r, in, kernel…], or one matrix for each expert, [bank, r, in].
        lora_B: [out, r], or with the same further dimensions.
        init: "kaiming" (A kaiming-uniform with a = √5, B zero: arXiv:2106.09685 as published), "gaussian" (A normal
            with standard deviation 1/r, B zero), "orthogonal" (rows of A orthonormal, B zero), "random" (as kaiming,
            B too: for tests; the adapted model then differs from its base).  What data makes is zero until then.
        kind: "bank" for one matrix for each of several experts; "embedding" if the input is one-hot: then A is zero and
            B normal, as PEFT and loralib do it ("random" fills both).
    """
    order = ((lora_B, False), (lora_A, True)) if kind == "embedding" else ((lora_A, True), (lora_B, False))
    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
        for factor, is_A in order:
            fill(factor, is_A, init, kind)


def fill(factor: Tensor, is_A: bool, init: str, kind: Kind) -> None:
    """Fill one factor in place, as `initialise` does, where no gradient is wanted."""
    draw: Callable[[Tensor], object]
    if kind == "embedding":
        draw = Tensor.zero_ if is_A and init != "random" else nn.init.normal_
    elif is_A:
        draw = _INITIALISE_A.get(init, Tensor.zero_)
    else:
        draw = _kaiming if init == "random" else Tensor.zero_
    for matrix in factor if kind == "bank" else (factor,):
        draw(matrix)


def _kaiming(weight: Tensor) -> None:
    """Fill as `nn.init.kaiming_uniform_` with a = √5 does, with the same bits; of a matrix in one call."""
    if weight.dim() != 2 or not weight.numel() or type(weight) not in (Tensor, nn.Parameter) or torch.is_grad_enabled():
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        return
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(weight.shape[1]))
    weight.uniform_(-bound, bound)


def _gaussian(weight: Tensor) -> None:
    nn.init.normal_(weight, std=1 / weight.shape[0])


_INITIALISE_A: dict[str, Callable[[Tensor], object]] = {
    "kaiming": _kaiming,
    "random": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": nn.init.orthogonal_,
}
