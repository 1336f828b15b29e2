"""In which order the products of a linear and its adapter are taken, by the layer's sizes and the number of tokens.

factored    y = x Wᵀ, then += s · hᵀ Bᵀ in place; backward: dx = dy W, then += zᵀ A in place
merged      W' = W + s · B A, y = x W'ᵀ; W' is not kept; backward: W' anew, and dx = dy W'

Both take h = A xᵀ (merged: in the backward pass), z = s · Bᵀ dyᵀ, dBᵀ = s · h dy and dA = z xᵀ.  So N (m + n) numbers
that are changed, 2r FLOPs each, stand against 2mn that are made, and merged can win only where N exceeds the width d;
then it saves up to about r / d of the layer's step, and the traffic of the changes.

Measured (one thread of an AMD EPYC, float32, layers d × d, step of merged over step of factored; medians of paired
ratios), N being 512, 2048, 8192:  d = 768:   r = 8    1.06  1.00  0.97      r = 64   1.05  0.97  0.95
                                              r = 16   1.03  0.98  0.98      r = 128  1.08  0.94  0.90
                                   d = 2048:  r = 8    1.06  1.00  0.99      r = 64   1.13  1.01  0.97
                                              r = 16   1.05  1.01  1.00      r = 128  1.17  1.03  0.97
So at r ≤ 16 there is next to nothing to win.  `benchmarks/contraction.py` measures it anew.

Source: Cherniuk et al. 2023 (RunLoRA), arXiv:2312.03415, §3, whose forward pass 2 and backward pass 5 are merged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_fx.adapters.fused import machine
from lora_fx.adapters.fused.machine import Contraction, Machine, Products
from lora_fx.models.quantised import is_quantised
from lora_fx.planning.planned import PlannedSite, not_fused

GAIN = 0.02
"""Part of a layer's step that merging must save by prediction: less is noise, and W' takes memory for a moment."""
DEFAULT = Machine(wide=1.1e-11, knee=16.0, traffic=2e-11, fresh=3e-10, call=2e-5)
"""Of a processor that nobody has calibrated: as measured above, with making W' dearer and changing y and dx cheaper."""
_SIZES = {torch.float32: 4, torch.float64: 8}
_DTYPES = {str(each).removeprefix("torch."): each for each in (*_SIZES, torch.float16, torch.bfloat16)}
_ALIGNED = 64
_FAR = 1 << 30


def choose(x: Tensor, weight: Tensor, first: Tensor, second: Tensor, dropout: bool, dora: bool) -> Contraction:
    """Return the order of the products of a layer that is called with x.

    Merged only where nothing is in the way, the factors A and B are trained, and it is predicted to save GAIN of the
    step; the prediction takes it that x wants a gradient.

    Args:
        x: [.., in].
        weight: [out, in] or [in, out].
        first: A.
        second: B.
        dropout: whether x is dropped out on its way to A.
        dora: whether the adapter is DoRA's.
    """
    if not (torch.is_grad_enabled() and first.requires_grad and second.requires_grad):
        return "factored"
    if obstacle(x.dtype, first.dtype, dropout, dora) or not _is_like_fresh(weight):
        return "factored"
    rank, inputs = first.shape
    least = least_rows(x.device.type, x.dtype, torch.get_num_threads(), inputs, second.shape[0], rank)
    return "factored" if least is None or x.shape[:-1].numel() < least else "merged"


def obstacle(base: torch.dtype, factors: torch.dtype, dropout: bool, dora: bool) -> str:
    """Return why W + s · B A cannot stand for both; empty if it can."""
    if dropout or dora:
        return "dropout" if dropout else "DoRA"
    if base in _SIZES:
        return "" if factors == base else "factors of another dtype"
    return "half precision"  # the rounding of W + s · B A would swallow the adapter


def _is_like_fresh(weight: Tensor) -> bool:
    """Whether the weight lies in memory as W' will: matrix libraries may sum in another order where it does not."""
    return weight.is_contiguous() and weight.data_ptr() % _ALIGNED == 0


@functools.cache
def least_rows(kind: str, dtype: torch.dtype, threads: int, inputs: int, outputs: int, rank: int) -> int | None:
    """Return from how many tokens on a layer is merged on a type of device; None if it never is."""
    found = _machine(kind, dtype, threads)[0]
    return None if found is None else crossover(found, Products(inputs, outputs, rank, _SIZES[dtype]))


def crossover(found: Machine, site: Products) -> int | None:
    """Return from how many tokens on merging saves GAIN of the layer's step; None if it never does."""
    fixed, far = (
        found.seconds(rows, site, "merged") - (1 - GAIN) * found.seconds(rows, site, "factored") for rows in (0, _FAR)
    )  # in between it is linear
    return None if far >= 0 else max(1, math.ceil(_FAR * fixed / (fixed - far)))


def _machine(kind: str, dtype: torch.dtype, threads: int) -> tuple[Machine | None, str]:
    """Return the costs, and where they come from; there are none for a device that nobody has calibrated."""
    found = machine.calibrated(kind, str(dtype).removeprefix("torch."), threads)
    if found is not None:
        return found, "calibrated"
    return (DEFAULT, "default") if kind == "cpu" else (None, f"none for {kind}")


def forget() -> None:
    """Let the next choice read the calibration again."""
    least_rows.cache_clear()
    machine.forget()


# -- for `explain`


def teller(model: nn.Module) -> Callable[[PlannedSite], str]:
    """Return a function that says how an adapted linear layer of the model will be computed; empty for other sites."""
    kind = next((each.device.type for each in model.parameters()), "cpu")
    quantised = frozenset(name for name, each in model.named_parameters() if is_quantised(each))
    return functools.partial(_told, "cpu" if kind == "meta" else kind, torch.get_num_threads(), quantised)


def _told(kind: str, threads: int, quantised: frozenset[str], planned: PlannedSite) -> str:
    site, lora = planned.site, planned.lora
    if planned.decision != "adapt" or lora is None or site.op != "linear" or site.read or site.parameter:
        return ""
    why = "slices" if planned.slices is not None else not_fused(planned)
    why = "quantised weight" if site.weight in quantised else why
    if why:
        return f"factored ({why})"
    dtype = _DTYPES[site.dtype]
    why = obstacle(dtype, dtype, bool(lora.dropout), lora.dora)
    if why:
        return f"factored ({why})"
    outputs, inputs = site.features
    least, origin = least_rows(kind, dtype, threads, inputs, outputs, lora.r), _machine(kind, dtype, threads)[1]
    if least is None:
        return f"factored (cost model: {origin})"
    return f"factored below {least:,} tokens, merged from there on (cost model: {origin})"
