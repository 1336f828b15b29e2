"""In which order the products of a linear and its adapter are taken: by their FLOPs, and where both orders are exact.

factored    y = x Wᵀ, then += s · hᵀ Bᵀ in place; backward: dx = dy W, then += zᵀ A in place
merged      W' = W + s · B A, y = x W'ᵀ; W' is not kept; backward: W' again, and dx = dy W'

Both take h = A xᵀ (merged: in the backward pass), z = s · Bᵀ dyᵀ, dBᵀ = s · h dy and dA = z xᵀ.  So for N rows of x and
W [n, m], 2r N (m + n) FLOPs for changing y and dx stand against 2r · 2mn for making W' twice; merged can win only where
N exceeds the width of the layer, and then up to about r / d of the step of a layer d × d.

Source: Cherniuk et al. 2023 (RunLoRA), arXiv:2312.03415, §3, whose forward pass 2 and backward pass 5 are merged.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_fx.models.packed import packed_layers
from lora_fx.models.quantised import is_quantised
from lora_fx.models.tensors import dotted
from lora_fx.planning.planned import PlannedSite

GAIN = 0.02
"""Part of a step's FLOPs that merging must save: less is noise, and W' takes memory for a moment."""
FEWEST = 512
"""Rows below which nothing is merged: of a step so small, calls take more than FLOPs."""
_EXACT = {"float32": torch.float32, "float64": torch.float64}
_ALIGNED = 64


def merges(x: Tensor, weight: Tensor, first: Tensor, second: Tensor, dropout: bool, dora: bool) -> bool:
    """Return whether a layer that is called with x meets W + s · B A instead of W and the factors apart.

    Only on a processor, where it is measured to pay, where nothing is in the way, and where A and B are trained; it is
    taken for granted that x wants a gradient.

    Args:
        x: [.., in].
        weight: [out, in] or [in, out].
        first: A [r, in].
        second: B [out, r].
        dropout: whether x is dropped out on its way to A.
        dora: whether the adapter is DoRA's.
    """
    if not (torch.is_grad_enabled() and first.requires_grad and second.requires_grad):
        return False
    if obstacle(x.dtype, first.dtype, dropout, dora) or x.device.type != "cpu" or not _is_like_fresh(weight):
        return False
    rank, inputs = first.shape
    least = least_rows(inputs, second.shape[0], rank)
    return least is not None and x.shape[:-1].numel() >= least


def obstacle(base: torch.dtype, factors: torch.dtype, dropout: bool, dora: bool) -> str:
    """Return why W + s · B A cannot stand for both; empty if it can."""
    if dropout or dora:
        return "dropout" if dropout else "DoRA"
    if base in _EXACT.values():
        return "" if factors == base else "factors of another dtype"
    return "half precision"  # the rounding of W + s · B A would swallow the adapter


def _is_like_fresh(weight: Tensor) -> bool:
    """Whether the weight lies in memory as W' will: matrix libraries may sum in another order where it does not."""
    return weight.is_contiguous() and weight.data_ptr() % _ALIGNED == 0


def least_rows(inputs: int, outputs: int, rank: int) -> int | None:
    """Return from how many rows of x on merging saves GAIN of the layer's FLOPs; None if it never does.

    >>> [least_rows(768, 768, rank) for rank in (8, 16, 64, 128)]
    [None, None, 1098, 937]
    """
    matrix, sides = inputs * outputs, rank * (inputs + outputs)
    saved = 2 * sides - GAIN * (4 * matrix + 6 * sides)  # for each row: 4mn + 6r (m + n) FLOPs are a factored step
    return max(FEWEST, math.ceil(4 * rank * matrix / saved)) if saved > 0 else None


# -- for `explain`


def contraction_teller(model: nn.Module) -> Callable[[PlannedSite], str]:
    """Return a function that says how an adapted linear layer of the model will be computed; empty for other sites."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    quantised = frozenset(name for name, parameter in model.named_parameters() if is_quantised(parameter))
    quantised |= {dotted(path, "weight") for path, _ in packed_layers(model)}
    return functools.partial(_order, device, quantised)


def _order(device: str, quantised: frozenset[str], planned: PlannedSite) -> str:
    site, lora = planned.site, planned.lora
    if planned.decision != "adapt" or lora is None or site.op != "linear" or site.read or site.parameter:
        return ""
    why = "slices" if planned.slices is not None else planned.not_fused
    why = "quantised weight" if site.weight in quantised else why
    why = why or ("a frozen A, so x is not kept" if lora.lora_fa else "")
    dtype = _EXACT.get(site.dtype, torch.bfloat16)
    why = why or obstacle(dtype, dtype, bool(lora.dropout), lora.dora)
    if not why and device not in ("cpu", "meta"):
        why = f"always on {device}"
    least = None if why else least_rows(site.features[1], site.features[0], lora.r)
    if least is None:
        return f"factored ({why or f'merging saves less than {GAIN:.0%} of the FLOPs'})"
    return f"factored below {least:,} tokens, merged from there on"
