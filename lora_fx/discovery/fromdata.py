"""plan_from_data: the first values of adapters, and EVA's ranks, from batches of data; the model stays unchanged."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.factors.decompositions import Factors
from lora_fx.adapters.factors.fromdata import Covariance, Directions, corda, eva, loftq, lora_ga
from lora_fx.adapters.factors.lora import as_rows
from lora_fx.discovery.gradients import Loss, gradients_of
from lora_fx.discovery.inputs import Noted, note_inputs
from lora_fx.discovery.redistributed import redistributed
from lora_fx.discovery.study import CAPTURING, observed
from lora_fx.errors import RefusedError
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.modes import making
from lora_fx.models.offload import stored_weight
from lora_fx.models.quantised import dense
from lora_fx.models.samples import Sample, batches_of, samples_for
from lora_fx.planning.decide import decide
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedSite
from lora_fx.planning.ranks import RHO
from lora_fx.progress.steps import ShowProgress
from lora_fx.regions.survey import trial_twin
from lora_fx.rules.inits import FROM_DATA, FROM_INPUTS
from lora_fx.rules.reader import read_rules


def plan_from_data(
    model: nn.Module,
    rules: Any,
    data: Iterable[object] = (),
    example_inputs: object = None,
    *,
    loss: Loss | None = None,
    original: nn.Module | None = None,
    progress: ShowProgress = None,
) -> Plan:
    """Return a plan whose adapters start at values from data, for `apply(model, plan)`; the model stays unchanged.

    The rules say where, by `init: eva`, `corda`, `corda_kpm`, `lora_ga` or `loftq`; all other sites are planned as by
    `plan`.  EVA gives ranks to the sites where they explain most: as many in all, at most twice as many at one; what
    gets none is skipped.  The plan shows the ranks, and its `rules` have them.  A and B travel with the plan in this
    process; its JSON has none.

    Args:
        model: as for `plan`, with values; a twin runs, in eval mode.
        rules: as for `plan`.
        data: batches, each as `example_inputs` are: a tuple, a dict, a `lora_fx.call(...)`; on the model's device.
            Each is used once.  Where a batch has an `attention_mask` or `labels` of the input's rows, padding and rows
            labelled -100 do not count for EVA and CorDA.
        example_inputs: as for `plan`; None: the first batch.
        loss: for `lora_ga`, a function of the model's output and the batch that gives a scalar; None: `output.loss`.
        original: for `loftq`, the model before its weights were quantised; it stays unchanged.
        progress: as for `plan`.

    Raises:
        RefusedError: no rule makes first values from data; data, loss or original that one needs are missing; a site
            that the data does not reach, or with values that are not finite.  Names every such site.
        CaptureError: as `plan`; `data` is one batch, or a batch in it has another form.
        RuleError, NoMatchError: as `plan`.
    """
    batches = batches_of(data)
    given = (batches[:1] or None) if example_inputs is None else example_inputs
    wanted = read_rules(rules)
    with making("plan_from_data", progress, 3 + CAPTURING):
        refuse_sharded(
            model, "processes hold parts of this model, and data shows it nothing", "plan from data before fully_shard"
        )
        seen = observed(model, samples_for(model, given))
        decisions = decide(wanted, seen.inventory)
        sites = [site for site in decisions.adapted if site.lora is not None and site.lora.init in FROM_DATA]
        if not sites:
            advice = f"give sites an init out of {', '.join(FROM_DATA)}, or use lora_fx.plan"
            refused = [(site.path, site.reason) for site in decisions.refused]
            raise RefusedError("no site that is adapted has first values from data", refused, advice)
        _check(sites, batches, original)
        met = _inputs(model, [site for site in sites if _init(site) in FROM_INPUTS], batches)
        if shared := redistributed(wanted, decisions, met, seen.inventory):
            decisions = decide(shared, seen.inventory, strict=False)
        along = [site for site in sites if _init(site) == "lora_ga"]
        values = gradients_of(model, along, batches, loss, "lora_ga", _along_gradient)
        values |= {
            site.path: _values(site, model, met.get(site.path), original)
            for site in decisions.adapted
            if site.lora is not None and site.lora.init in FROM_DATA and site.path not in values
        }
        _refuse_not_finite(values)
        return replace(seen.planned(decisions), first_values=values)


def _init(site: PlannedSite) -> str:
    assert site.lora is not None
    return site.lora.init


def _check(sites: Sequence[PlannedSite], batches: Sequence[Sample], original: nn.Module | None) -> None:
    lacking = [
        (site.path, f"init {_init(site)} needs {what}")
        for site in sites
        for what, there in (("`original`", original is not None), ("`data`", bool(batches)))
        if (_init(site) == "loftq") == (what == "`original`") and not there
    ]
    if lacking:
        raise RefusedError("what first values are made from is not given", lacking)


def _refuse_not_finite(values: Mapping[str, Factors]) -> None:
    bad = [(path, "NaN or infinite") for path, pair in values.items() if not all(map(_is_finite, pair))]
    if bad:
        raise RefusedError("first values from this data are not finite", bad, "look for NaN and overflow in the model")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


# -- what the data shows


def _inputs(
    model: nn.Module, sites: Sequence[PlannedSite], batches: Sequence[Sample]
) -> dict[str, Directions | Covariance]:
    """Return what each site is given on the data, as its scheme needs it."""
    met = {site.path: _statistic(site) for site in sites}
    if not sites:
        return {}
    with trial_twin(model) as twin:
        note_inputs(twin, [Noted(site.site.owner, site.path, met[site.path]) for site in sites], batches)
    problems = [(site.path, reason) for site in sites if (reason := _too_little(site, met[site.path]))]
    if problems:
        raise RefusedError("the data does not show enough of these", problems, "give other data, or another init")
    return met


def _statistic(site: PlannedSite) -> Directions | Covariance:
    assert site.lora is not None
    most = min(round(site.lora.r * RHO), *site.site.features)
    return Directions(most) if site.lora.init == "eva" else Covariance()


def _too_little(site: PlannedSite, met: Directions | Covariance) -> str:
    if not met.count:
        return "never called"
    assert site.lora is not None
    needed = site.lora.r if isinstance(met, Directions) else 1
    return f"called with {met.count} rows that count, fewer than r={needed}" if met.count < needed else ""


# -- values


def _along_gradient(site: PlannedSite, slope: Tensor) -> Factors:
    assert site.lora is not None
    return lora_ga(as_rows(slope, site.site.layout), site.lora.r)


@torch.no_grad()
def _values(
    site: PlannedSite, model: nn.Module, met: Directions | Covariance | None, original: nn.Module | None
) -> Factors:
    """Return the first values of a site."""
    lora = site.lora
    assert lora is not None
    if isinstance(met, Directions):
        return eva(met, lora.r, site.site.features[0])
    weight = _weight(model, site)
    if isinstance(met, Covariance):
        return corda(weight, met, lora.r, lora.scaling, lora.init == "corda_kpm")
    assert original is not None
    return loftq(_weight(original, site), weight, lora.r, lora.scaling)


def _weight(model: nn.Module, site: PlannedSite) -> Tensor:
    """Return the numbers of a site's weight [out, in]."""
    try:
        stored = stored_weight(model.get_submodule(site.site.owner), site.site.weight.rpartition(".")[2])
    except (AttributeError, KeyError) as error:
        raise RefusedError("`original` is another model", [(site.path, "is not in it")]) from error
    weight: Tensor = as_rows(dense(stored).detach(), site.site.layout)
    if weight.shape != site.site.features or not weight.is_floating_point():
        found = f"{weight.dtype} {list(weight.shape)} in place of {list(site.site.features)}"
        raise RefusedError("first values need the numbers of the weights", [(site.path, found)])
    return weight
