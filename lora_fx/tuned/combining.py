"""combine: several adapters of a model → one more, which is their weighted sum or what a method makes of them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, with_values
from lora_fx.adapters.factors.blending import Blend, Majority, truncated, truncated_matrix
from lora_fx.adapters.factors.moved import MovedA
from lora_fx.adapters.factors.spec import ModelRecord
from lora_fx.adapters.parallel import placed_beside
from lora_fx.errors import RefusedError
from lora_fx.models.between import one_at_a_time
from lora_fx.models.joining import apart
from lora_fx.models.modes import normal_tensors
from lora_fx.models.wrappers import seen_through
from lora_fx.planning.planned import PlannedSite
from lora_fx.planning.sites import CONVOLUTIONS
from lora_fx.rules.given import is_number, is_whole
from lora_fx.rules.keys import RANK
from lora_fx.rules.ruleset import LoRAConfig
from lora_fx.tuned.build import whole_record_in
from lora_fx.tuned.several import adapters_called, attach_more, changing, check_trainable, refuse_name, trained_beside
from lora_fx.tuned.switching import selection_of

Method = Literal[
    "cat", "linear", "ties", "dare", "dare_linear", "dare_ties", "magnitude_prune",
    "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
Part = tuple[Attached, float]
"""An adapter at a site, and weight · scaling."""


@one_at_a_time
def combine(
    tuned: nn.Module,
    adapters: Sequence[str] | Mapping[str, float],
    *,
    adapter: str,
    method: Method = "cat",
    r: int | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
    trainable: bool = True,
) -> None:
    """Make one more adapter of several, in place; they stay as they are, and the new one is not in use.

    - `cat`: exactly Σ weight · ΔW, of a rank that is the sum of theirs.
    - `svd`: the nearest to that of rank `r` (Eckart and Young 1936); the largest of their ranks by default.
    - `linear`: A and B are summed apart, A with ±√|weight · scaling|, B with √|weight · scaling|, as PEFT does; B A
      then has products of one adapter's B and another's A in it.
    - `ties` (arXiv:2306.01708), `dare_linear` and `dare_ties` (arXiv:2311.03099), `magnitude_prune`: so too, of what is
      left of A and B after pruning.  `dare` is `dare_linear`.
    - the same with `_svd`: of the ΔW themselves, which are formed site by site, then the nearest of rank `r`.

    The new adapter has the scaling 1 and no dropout.  The names and numbers are those of PEFT's
    `add_weighted_adapter`.  Every process calls it that holds a part of the model.

    Args:
        tuned: an adapted model.
        adapters: names, or weights by name, factors of ΔW without a unit.
        adapter: name of the new one.
        method: as above.
        r: rank at every site, with `svd` and the like.
        density: share of the values that is kept, above 0 to 1; needed where a method prunes.
        majority: whose sign counts with `ties`: that of the sum ("total") or that of most ("frequency").
        seed: of what `dare` drops.
        trainable: whether the new parameters require a gradient.

    Raises:
        ValueError: an unknown name or method, a taken name, an option that the method does not take or lacks, or ranks
            that differ where A and B are summed.
        RefusedError: DoRA, slices, an adapter for each call, biases, rows or modules of the model that are trained;
            sites that not all have, where A and B are summed.
    """
    tuned = seen_through(tuned)
    record = whole_record_in(tuned)
    weights = dict(selection_of(record.switch.names, adapters).weights)
    recipe = _recipe(weights, method, r, density, majority, seed)
    refuse_name(adapter, record.switch.names)
    check_trainable(trainable)
    sites = _sites(with_values(tuned), weights)
    _refuse_beside(tuned, record, weights)
    _refuse_kinds(sites)
    if recipe.of_factors:
        _refuse_unlike(sites, len(weights), method)
    with normal_tensors(), torch.no_grad():
        made = {path: recipe.made(parts) for path, parts in sites.items()}
    planned = tuple(_planned(sites[path][0][0], A.shape[-2], adapter) for path, (A, _) in made.items())
    plan = replace(record.plan, sites=planned, train=(), tokens=(), biases=(), rules={})
    with apart(tuned), changing(tuned, record), normal_tensors():
        with torch.random.fork_rng(devices=[]):  # fresh factors draw numbers
            attach_more(tuned, plan, record, start=False)
        with torch.no_grad():
            for _, one in adapters_called(tuned, adapter):
                A, B = made[one.spec.path]
                one.lora_A.weight.copy_(A.reshape(one.lora_A.weight.shape)).requires_grad_(trainable)
                one.lora_B.weight.copy_(B.reshape(one.lora_B.weight.shape)).requires_grad_(trainable)
        placed_beside(tuned, [adapter])


@dataclass(frozen=True, slots=True)
class _Recipe:
    method: Method
    r: int | None
    blend: Blend

    @property
    def of_factors(self) -> bool:
        """Whether A and B are blended apart."""
        return self.method != "cat" and not self.method.endswith("svd")

    def made(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Return the new A [.., r, in] and B [.., out, r] of a site, in float32 or wider: not yet rounded."""
        factors = [(_flat(one, one.lora_A.plain), _flat(one, one.lora_B.plain)) for one, _ in parts]
        dtype = reduce(torch.promote_types, (factor.dtype for both in factors for factor in both))
        wide = torch.promote_types(dtype, torch.float32)  # a product by a weight in half precision would be rounded
        factors = [(A.to(wide), B.to(wide)) for A, B in factors]
        shares = [share for _, share in parts]
        if self.of_factors:
            roots = [math.sqrt(abs(share)) for share in shares]
            signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
            return self.blend([A for A, _ in factors], signed), self.blend([B for _, B in factors], roots)
        r = self.r or max(A.shape[-2] for A, _ in factors)
        if self.method in ("cat", "svd"):
            A = torch.cat([A for A, _ in factors], dim=-2)
            B = torch.cat([B * share for (_, B), share in zip(factors, shares, strict=True)], dim=-1)
            if self.method == "cat":
                return A, B
            second, first = truncated(B, A, r)
            return first, second
        deltas = [B @ A * one.spec.scaling for (A, B), (one, _) in zip(factors, parts, strict=True)]
        weights = [share / one.spec.scaling if one.spec.scaling else 0.0 for one, share in parts]
        second, first = truncated_matrix(self.blend(deltas, weights), r)
        return first, second


def _flat(one: Attached, factor: Tensor) -> Tensor:
    """Return a factor as a matrix [.., rows, columns]."""
    return factor.flatten(1) if one.spec.site.op in CONVOLUTIONS else factor


def _recipe(
    weights: Mapping[str, float], method: Method, r: int | None, density: float | None, majority: Majority, seed: int
) -> _Recipe:
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
    if not weights:
        raise ValueError("no adapter has a weight, so there is nothing to combine")
    if majority not in get_args(Majority):
        raise ValueError(f"majority is {majority!r}; it must be one of {', '.join(get_args(Majority))}")
    kind = "linear" if method in ("cat", "svd") else method.removesuffix("_svd")
    kind = "dare_linear" if kind == "dare" else kind
    prunes = kind != "linear"
    if prunes and not is_number(density, above=0, highest=1):
        raise ValueError(f"density is {density!r}; {method} needs a share above 0, at most 1")
    if not prunes and density is not None:
        raise ValueError(f"{method} prunes nothing: leave density out")
    if r is not None and not (method.endswith("svd") and is_whole(r, 1, RANK["maximum"])):
        raise ValueError(f"r is {r!r}; it is a whole number from 1 to {RANK['maximum']}, for svd and the like")
    if not is_whole(seed, -(2**63), 2**64 - 1):
        raise ValueError(f"seed is {seed!r}; it is a whole number of 64 bits")
    generator = torch.Generator().manual_seed(seed)
    return _Recipe(method, r, Blend(kind, density or 1.0, majority, generator))  # type: ignore[arg-type]


def _sites(tuned: nn.Module, weights: Mapping[str, float]) -> dict[str, list[Part]]:
    """Return the adapters at each site, in the order of their weights; sites in model order."""
    found: dict[str, dict[str, Part]] = {}
    for name, weight in weights.items():
        for _, one in adapters_called(tuned, name):
            found.setdefault(one.spec.path, {})[name] = (one, weight * one.spec.scaling)
    order = [site.path for site in whole_record_in(tuned).plan.sites]
    places = {path: number for number, path in enumerate(order)}
    paths = sorted(found, key=lambda path: places.get(path, len(places)))
    return {path: [found[path][name] for name in weights if name in found[path]] for path in paths}


def _refuse_beside(tuned: nn.Module, record: ModelRecord, names: Collection[str]) -> None:
    """Refuse adapters with rows, biases or modules of the model's own: a product B A has no place for them."""
    if facts := trained_beside(tuned, record, names):
        raise RefusedError("these cannot be combined to one adapter", facts, "lora_fx.use sums what they compute")


def _refuse_kinds(sites: Mapping[str, Sequence[Part]]) -> None:
    facts = [
        (path, f"'{one.spec.adapter}' {kind}")
        for path, parts in sites.items()
        for one, _ in parts
        for has, kind in (
            (bool(one.spec.lora.invocation), "acts from an invocation on"),
            (one.magnitude is not None, "is DoRA, whose change is no product B A"),
            (bool(one.spec.parts), "adapts slices"),
            (one.call is not None, "is one for each call"),
            (one.trained_bias is not None, "trains a bias"),
            (one.lora_A.weight.is_meta, "has no values"),
        )
        if has
    ]
    if facts:
        raise RefusedError("these cannot be combined to one adapter", facts, "lora_fx.use sums what they compute")


def _refuse_unlike(sites: Mapping[str, Sequence[Part]], number: int, method: str) -> None:
    """Refuse sites that not all have, and ranks that differ: A and B are summed entry by entry."""
    lacking = [(path, "not all adapters have it") for path, parts in sites.items() if len(parts) < number]
    lacking += [
        (path, f"'{one.spec.adapter}' starts at parts of the weight, which are no change of it")
        for path, parts in sites.items()
        for one, _ in parts
        if isinstance(one.lora_A, MovedA)
    ]
    if lacking:
        raise RefusedError(
            f"{method} sums A and B of adapters entry by entry", lacking, "method='cat' or 'svd' needs not"
        )
    unlike = [path for path, parts in sites.items() if len({one.spec.rank for one, _ in parts}) > 1]
    if unlike:
        raise ValueError(f"{method} needs equal ranks, and they differ at {', '.join(unlike[:6])}; take cat or svd")


def _planned(like: Attached, rank: int, adapter: str) -> PlannedSite:
    lora = LoRAConfig(r=rank, alpha=rank, adapter=adapter)
    return PlannedSite(like.spec.site, "adapt", "combined", None, lora, backend_reason='backend="modules"')
