"""allocate: rules whose ranks are spread over the sites under a budget, by spectrum or gradient."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.factors.decompositions import leading_values
from lora_fx.discovery.gradients import Loss, check_loss, gradients_of
from lora_fx.discovery.study import observed
from lora_fx.errors import InvariantError, RefusedError
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.modes import making
from lora_fx.models.offload import stored_weight
from lora_fx.models.quantised import dense
from lora_fx.models.samples import Sample, batches_of, samples_for
from lora_fx.planning.allocation import AllocatedSite, Allocation
from lora_fx.planning.decide import decide
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.planned import Inventory, PlannedSite
from lora_fx.planning.ranks import RHO, Gains, spread, with_ranks
from lora_fx.progress.steps import ShowProgress, step
from lora_fx.rules.given import is_number, is_whole
from lora_fx.rules.inits import ranks_needed
from lora_fx.rules.keys import RANK
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import LoRAConfig, RuleSet

_NONE = "others gain more by a rank"
Values = tuple[tuple[float, ...], float]
"""Shares of the directions, the largest first; and how much they count together."""


def allocate(
    model: nn.Module,
    rules: Any,
    example_inputs: object = None,
    *,
    budget: int | None = None,
    mean_r: float | None = None,
    data: Iterable[object] | None = None,
    loss: Loss | None = None,
    least: int = 1,
    most: int | None = None,
    progress: ShowProgress = None,
) -> Allocation:
    """Return rules with ranks spread over the sites under a budget, and why; the model stays unchanged.

    `plan` and `apply` take the result as rules, `to_yaml()` is the text of a rule file, printed it is a table.  Each
    next rank goes where it gains most for each parameter (with `mean_r`: for each rank).  Without data the gain of a
    direction is its share of the weight's spectrum, σ² / ‖W‖²; with data it is σ² of the mean gradient of the loss for
    the weight: in proportion to it, to first order, a step along it lowers the loss.  alpha follows r, so that the
    alpha / r of each rule stays, and with it the scaling; rsLoRA's then goes with √r, as in PEFT.  Modules under
    `train:`, biases and magnitudes are not counted.  The same call gives the same ranks; a weight, or the gradients of
    a few, are held at once.

    Args:
        model: as for `plan`, with values; with data a twin runs, in eval mode.
        rules: as for `plan`: which sites, with which ranks at first.
        example_inputs: as for `plan`; None: the first batch.
        budget: number of parameters of all factors together that is not exceeded; None: as many as by the rules.
        mean_r: in place of a budget, the mean rank over the sites that is not exceeded.
        data: batches, as for `plan_from_data`; each is run once, for each group of weights whose gradients fit.
        loss: of output and batch, a scalar; None: `output.loss`.
        least: rank that every site gets; 0 lets sites that gain nothing be skipped.
        most: highest rank of a site; None: twice what an even spread would give it.  No rank is above the smaller side.
        progress: as for `plan`.

    Raises:
        ValueError: a budget or limit that none can be, both budgets, or a loss without data.
        RefusedError: a budget below the least ranks; no batches; a site whose weight has no numbers here, or that no
            gradient reaches; `init: eva`, which has ranks of its own.  Names every such site.
        RuleError, NoMatchError, CaptureError: as `plan`.

    Source: redistribution: Paischer et al. 2024, arXiv:2410.07170, §3.3; gradient: Wang et al. 2024, arXiv:2407.05000.
    """
    _check_numbers(budget, mean_r, least, most)
    if loss is not None and data is None:
        raise ValueError("loss is for data: give batches, or leave the loss out")
    wanted = read_rules(rules)
    check_loss(loss)
    batches = None if data is None else batches_of(data)
    if batches is not None and not batches:
        raise RefusedError("data has no batches", advice="give some, or leave data out: ranks go by the spectrum then")
    given = batches[:1] if example_inputs is None and batches else example_inputs
    with making("allocate", progress, 4):
        refuse_sharded(
            model, "processes hold parts of this model, and its ranks are not allocated", "before fully_shard"
        )
        inventory = observed(model, samples_for(model, given)).inventory
        decisions = decide(wanted, inventory)
        _check_sites(decisions, by_gradient=batches is not None)
        asked = _Asked(decisions.adapted, budget, mean_r, least, most)
        values = _by_spectrum(model, asked) if batches is None else _by_gradient(model, asked, batches, loss)
        ranks = spread(asked.gains(values), asked.budget, least)
        spread_rules = with_ranks(wanted, asked.sites, ranks, inventory, "", _NONE)
    _check_ranks(spread_rules, decisions, inventory, ranks)
    return _allocation(spread_rules, asked, ranks, values, "spectrum" if batches is None else "gradient")


# -- what is asked for


def _check_numbers(budget: int | None, mean_r: float | None, least: int, most: int | None) -> None:
    if budget is not None and mean_r is not None:
        raise ValueError("budget and mean_r are two ways to say one thing: give one of them")
    highest: int = RANK["maximum"]
    wrong = [
        f"{name} is {value!r}; it must be {what}"
        for name, value, what, right in (
            ("budget", budget, "a number of parameters, at least 1", is_whole(budget, 1)),
            ("mean_r", mean_r, f"a rank above 0, at most {highest}", is_number(mean_r, 0, highest)),
            ("least", least, f"a rank from 0 to {highest}", is_whole(least, 0, highest)),
            ("most", most, f"a rank from 1 to {highest}", is_whole(most, 1, highest)),
        )
        if value is not None and not right
    ]
    if not wrong and most is not None and least > most:
        wrong = [f"least is {least}, above most, {most}"]
    if wrong:
        raise ValueError("; ".join(wrong))


def _lora(site: PlannedSite) -> LoRAConfig:
    assert site.lora is not None
    return site.lora


def _check_sites(decisions: Decisions, by_gradient: bool) -> None:
    refused = [(site.path, site.reason) for site in decisions.refused]
    if not decisions.adapted:
        raise RefusedError("the rules adapt no site of this model", refused, "see lora_fx.plan(model, rules)")
    own = [(site.path, "init eva chooses ranks itself") for site in decisions.adapted if _lora(site).init == "eva"]
    if own:
        raise RefusedError("these have ranks from data already", own, "use lora_fx.plan_from_data, or another init")
    calls = [(site.path, "each call has an adapter of its own") for site in decisions.adapted if site.per_call]
    if calls and by_gradient:
        advice = "leave data out: ranks go by the spectrum then"
        raise RefusedError("a gradient is that of all calls together", calls, advice)


class _Asked:
    """The sites, with what each rank costs there and how high it may be."""

    def __init__(
        self,
        sites: Sequence[PlannedSite],
        budget: int | None,
        mean_r: float | None,
        least: int,
        most: int | None,
    ) -> None:
        self.sites, self.mean_r = sites, mean_r
        self.parameters = {site.path: _parameters_of_a_rank(site) for site in sites}
        self.costs = dict.fromkeys(self.parameters, 1) if mean_r is not None else self.parameters
        before = sum(_lora(site).r * self.costs[site.path] for site in sites)
        wanted = before if budget is None else budget
        self.budget = wanted if mean_r is None else math.floor(mean_r * len(sites) + 1e-9)
        even = self.budget / before
        self.highest = {
            site.path: most or max(least, 1, math.ceil(RHO * _lora(site).r * even - 1e-9)) for site in sites
        }
        self.caps = {site.path: min(self.highest[site.path], _widest(site)) for site in sites}
        self.least = {site.path: min(least, self.caps[site.path]) for site in sites}
        needed = sum(self.costs[path] * rank for path, rank in self.least.items())
        if needed > self.budget:
            unit = "ranks" if mean_r is not None else "parameters"
            facts = [("budget", f"{self.budget:,} {unit}"), ("needed", f"{needed:,} {unit}")]
            advice = "give more, or `least=0`, by which sites that gain little are skipped"
            raise RefusedError(f"the budget is below rank {least} at each of {len(sites)} sites", facts, advice)

    def gains(self, values: Mapping[str, Values]) -> list[Gains]:
        """Return what each rank gains, site by site."""
        return [
            Gains(path, tuple(share * size for share in shares), self.costs[path])
            for path, (shares, size) in ((site.path, values[site.path]) for site in self.sites)
        ]

    def limit(self, site: PlannedSite, rank: int) -> str:
        """Return what kept a rank from being another one, if that is not the gain."""
        if rank == self.caps[site.path]:
            narrow = self.caps[site.path] < self.highest[site.path]
            return f"its weight has no more than {rank}" if narrow else f"at most {rank}"
        return f"at least {rank}" if rank and rank == self.least[site.path] else ""


def _parameters_of_a_rank(site: PlannedSite) -> int:
    one, two = (replace(site, lora=replace(_lora(site), r=rank)).trainable for rank in (1, 2))
    return two - one


def _widest(site: PlannedSite) -> int:
    """Return the highest rank that saves anything, and that the first values can have."""
    widest: int = min(*site.site.features, RANK["maximum"])
    return max(1, widest // max(1, ranks_needed(_lora(site).init, 1)))


# -- what each rank gains


def _by_spectrum(model: nn.Module, asked: _Asked) -> dict[str, Values]:
    values: dict[str, Values] = {}
    with torch.no_grad(), step("spectra", len(asked.sites), "weights") as doing:
        for site in asked.sites:
            values[site.path] = _values(_stored(model, site), site, asked.caps[site.path], False)
            doing.advance()
    _refuse_not_finite(values, "weights")
    return values


def _by_gradient(model: nn.Module, asked: _Asked, batches: Sequence[Sample], loss: Loss | None) -> dict[str, Values]:
    def made(site: PlannedSite, slope: Tensor) -> Values:
        return _values(slope, site, asked.caps[site.path], True)

    values = gradients_of(model, asked.sites, batches, loss, "allocate", made)
    _refuse_not_finite(values, "gradients")
    return values


def _stored(model: nn.Module, site: PlannedSite) -> Tensor:
    weight = stored_weight(model.get_submodule(site.site.owner), site.site.weight.rpartition(".")[2])
    weight = dense(weight).detach()
    if weight.is_meta or not weight.is_floating_point():
        found = "has no values (meta device)" if weight.is_meta else f"is {weight.dtype}"
        advice = "load the model with its weights"
        raise RefusedError("a spectrum needs the numbers of the weights", [(site.path, found)], advice)
    return weight


def _values(stored: Tensor, site: PlannedSite, most: int, by_gradient: bool) -> Values:
    """Return the shares of the directions of a weight or gradient, and how much the whole counts.

    Of several matrices each weight counts alike, and each gradient as much as it has.
    """
    shares, whole = torch.zeros(most, dtype=torch.float64), 0.0
    for matrix in _matrices(stored, site):
        square = float(matrix.double().square().sum())
        found = leading_values(matrix, most).double().cpu().square() if 0 < square < math.inf else torch.zeros(0)
        shares[: len(found)] += found if by_gradient else found / (square or 1.0)
        whole += square if by_gradient or not math.isfinite(square) else 1.0
    return tuple((shares / (whole or 1.0)).tolist()), whole


def _matrices(stored: Tensor, site: PlannedSite) -> Iterator[Tensor]:
    """Yield the matrices that have factors of their own: of a bank one for each expert, of a fused weight each part."""
    weight = stored if site.site.layout == "out_in" else stored.transpose(-1, -2)
    for matrix in weight.unbind() if site.site.is_banked else (weight.flatten(1),):
        if site.slices is None:
            yield matrix
        else:
            parts = site.slices.ranges(site.site.features[0])
            yield from (torch.cat([matrix[first:end] for first, end in part]) for part in parts)


def _refuse_not_finite(values: Mapping[str, Values], what: str) -> None:
    bad = [(path, "NaN or infinite") for path, (_, size) in values.items() if not math.isfinite(size)]
    if bad:
        raise RefusedError(f"these {what} are not finite", bad, "look for NaN and overflow in the model")


# -- what comes out


def _check_ranks(rules: RuleSet, before: Decisions, inventory: Inventory, ranks: Mapping[str, int]) -> None:
    """Raise InvariantError where rules decide anything else than the ranks otherwise than those before them did."""
    after = {site.path: site for site in decide(rules, inventory, strict=False).sites}
    wrong = []
    for site in before.sites:
        now, rank = after[site.path], ranks.get(site.path)
        wanted = "skip" if rank == 0 else site.decision
        lora = None if site.lora is None or not rank else (rank, *_kept(site))
        found = None if now.lora is None else (now.lora.r, *_kept(now))
        if (now.decision, found) != (wanted, lora):
            wrong.append((site.path, f"{now.decision} {found} in place of {wanted} {lora}"))
    if wrong:
        raise InvariantError("rules with other ranks decide otherwise than they should", wrong)


def _kept(site: PlannedSite) -> tuple[object, ...]:
    """Return what stays where only ranks change."""
    lora = _lora(site)
    return f"{lora.alpha / lora.r:.9g}", replace(lora, r=1, alpha=1.0), site.slices, site.per_call


def _allocation(
    rules: RuleSet, asked: _Asked, ranks: Mapping[str, int], values: Mapping[str, Values], by: str
) -> Allocation:
    sites = tuple(
        AllocatedSite(
            site.path,
            site.site.text(),
            _lora(site).r,
            ranks[site.path],
            ranks[site.path] * asked.parameters[site.path],
            values[site.path][0],
            values[site.path][1],
            asked.limit(site, ranks[site.path]),
        )
        for site in asked.sites
    )
    inherited = {part.name: getattr(rules, part.name) for part in fields(RuleSet)}
    return Allocation(**inherited, sites=sites, by=by, budget=asked.budget, mean_r=asked.mean_r)
