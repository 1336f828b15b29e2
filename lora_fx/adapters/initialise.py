"""First values of A and B.  All but `random` start with B = 0, so that an adapted model equals its base bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def initialise(lora_A: Tensor, lora_B: Tensor, init: str) -> None:
    """Fill both factors in place with the scheme named `init` (one of `rules.INITS`), from torch's global generator.

    Args:
        lora_A: [r, in].
        lora_B: [out, r].
        init: "kaiming" (A kaiming-uniform with a = √5, B zero: arXiv:2106.09685 as published), "gaussian" (A normal
            with standard deviation 1/r, B zero), "orthogonal" (rows of A orthonormal, B zero), "random" (as kaiming,
            B too: for tests; the adapted model then differs from its base).
    """
    with torch.no_grad():
        _INITIALISE_A[init](lora_A)
        if init == "random":
            nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(lora_B)


def _kaiming(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _gaussian(weight: Tensor) -> None:
    nn.init.normal_(weight, std=1 / weight.shape[0])


_INITIALISE_A: dict[str, Callable[[Tensor], object]] = {
    "kaiming": _kaiming,
    "random": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": nn.init.orthogonal_,
}
