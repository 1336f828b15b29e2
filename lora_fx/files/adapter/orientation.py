"""How a site's factors lie to its weight as the checkpoint stores it: [out, in], or [in, out] as Conv1D does."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from lora_fx.files.adapter.read import SavedSite
from lora_fx.files.safetensors import RawTensor

Orientation = Literal["out_in", "in_out"]


def orientations(site: SavedSite, entry: RawTensor) -> tuple[Orientation, ...]:
    """Return the ways in which the product of the factors has the shape of the weight: none, one, or both if square.

    A convolution's factors are [r, in, …] and [out, r, 1, …], or flat.
    """
    out, inner = site.lora_B.shape[0], tuple(site.lora_A.shape[1:])
    shape, ways = entry.shape, []
    if shape and shape[0] == out and (shape[1:] == inner or (len(inner) == 1 and math.prod(shape[1:]) == inner[0])):
        ways.append("out_in")
    if len(inner) == 1 and shape == (inner[0], out):
        ways.append("in_out")
    multiply = site.lora_B.numel() == out * site.lora_A.shape[0]
    return tuple(ways) if multiply and len(shape) > 1 else ()  # type: ignore[arg-type]


def stored_factors(site: SavedSite, chosen: Orientation) -> tuple[Tensor, Tensor]:
    """Return (left [rows, r], right [r, columns]) whose product lies as the weight is stored; views."""
    A, B = site.lora_A.flatten(1), site.lora_B.flatten(1)
    return (B, A) if chosen == "out_in" else (A.t(), B.t())
