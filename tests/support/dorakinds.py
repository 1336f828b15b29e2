"""DoRA on the models of `sitekinds`: their rules, and the weights m · V / ‖V‖ that they must compute with."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lora_fx
from lora_fx.models.samples import Sample
from tests.support.compoundkinds import ATTENTION
from tests.support.layerkinds import LAYERS, SUBCLASSES
from tests.support.rawkinds import OTHERS, PRODUCTS, VIEWED
from tests.support.sitekinds import Kind, dense_weights, factors_of, flat, randomise_

KINDS = [
    kind
    for kind in (*LAYERS, *SUBCLASSES, *PRODUCTS, *VIEWED, *OTHERS, *ATTENTION)
    if not any(layout.startswith("bank") for layout in kind.weights.values())
]
"""All but banks of matrices, for which DoRA is refused."""


def dora_rules(kind: Kind, dropout: float = 0.0) -> dict[str, Any]:
    rules = kind.rules(dropout)
    rules["rules"][0]["lora"]["dora"] = True
    return rules


@functools.cache
def _adapted(name: str, backend: str, dtype: torch.dtype, dropout: float) -> nn.Module:
    kind = next(kind for kind in KINDS if kind.name == name)
    return lora_fx.apply(kind.build(dtype), dora_rules(kind, dropout), kind.sample(dtype), backend=backend)


def started(
    kind: Kind, backend: str = "modules", dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> nn.Module:
    """Return a copy of what `apply` gives."""
    return copy.deepcopy(_adapted(kind.name, backend, dtype, dropout))


def trained(
    kind: Kind, backend: str = "modules", dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> nn.Module:
    tuned = started(kind, backend, dtype, dropout)
    randomise_(tuned)
    return tuned


def magnitude_of(tuned: nn.Module, weight: str) -> nn.Parameter:
    """Return the lengths of a weight, found by their documented key."""
    A, _ = factors_of(tuned, weight)
    parameters = dict(tuned.named_parameters())
    key = next(name for name, parameter in parameters.items() if parameter is A)
    return parameters[key.replace("lora_A", "lora_magnitude_vector")]


def lengthened(V: Tensor, magnitude: Tensor, layout: str, rows: list[int] | None = None) -> Tensor:
    """Return m · V / ‖V‖ of a weight as it is stored, the norm being a constant; all rows, or some of them."""
    matrix = V.t() if layout == "in_out" else V.flatten(1)
    scale = torch.ones(len(matrix), dtype=V.dtype)
    at = torch.arange(len(matrix)) if rows is None else torch.tensor(rows)
    norms = torch.linalg.vector_norm(matrix, dim=1).detach()[at]
    scale = scale.index_put((at,), magnitude.flatten().to(V.dtype) / norms)
    whole = scale[:, None] * matrix
    return (whole.t() if layout == "in_out" else whole).reshape(V.shape)


def dora_weights(kind: Kind, tuned: nn.Module) -> dict[str, Tensor]:
    """Return m · V / ‖V‖ for every adapted weight, with a graph back to m, A and B."""
    return {
        name: lengthened(V, magnitude_of(tuned, name), kind.weights[name])
        for name, V in dense_weights(kind, tuned).items()
    }


def dora_reference(kind: Kind, tuned: nn.Module, sample: Sample) -> Tensor:
    """Return what the plain model computes with these weights."""
    weights = dora_weights(kind, tuned)
    dtype = next(iter(weights.values())).dtype
    model = kind.build(dtype).requires_grad_(False)
    return flat(functional_call(model, weights, sample.args, sample.kwargs, tie_weights=False))
