"""What a model is made of and which parts of it run as graphs: everything that a plan rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from lora_fx.errors import CaptureError
from lora_fx.planning import Plan, PlannedRegion, PlannedSite
from lora_fx.regions.survey import Survey, survey, survey_symbolically
from lora_fx.samples import Sample, dummy_samples, moved, samples_of
from lora_fx.twin import is_meta, make_twin


@dataclass(frozen=True, slots=True)
class Study:
    """What was captured while planning; a plan carries it so that `apply` need not capture again."""

    survey: Survey
    samples: tuple[Sample, ...]


def studied(plan: Plan, model: nn.Module, example_inputs: object, graphs: bool = True) -> Plan:
    """Return the plan with each site's backend and number of calls, found by running the model on samples.

    The model stays unchanged: a twin runs.

    Args:
        plan: a plan for the model.
        model: the model.
        example_inputs: the user's samples, or None.
        graphs: whether to capture graphs; without, only calls are counted.

    Raises:
        CaptureError: if the user's own inputs are of a wrong kind or the model refuses them.
    """
    if isinstance(model, fx.GraphModule) or not plan.adapted:
        return plan
    given = None if example_inputs is None else samples_of(example_inputs)
    samples = given or dummy_samples(model)
    if samples is None:
        return _without_inputs(plan, model) if graphs else plan
    try:
        return _surveyed(plan, model, _on_device(samples, model), graphs)
    except _ModelRefuses as refusal:
        if given is not None and not is_meta(model):
            raise CaptureError(
                "the model refuses the example inputs", [("(root)", str(refusal))], "check example_inputs"
            ) from refusal.__cause__
        return _noted(_without_inputs(plan, model), f"the model does not run on its sample inputs here: {refusal}")


class _ModelRefuses(Exception):
    """The model raised for a sample."""


def _surveyed(plan: Plan, model: nn.Module, samples: tuple[Sample, ...], graphs: bool) -> Plan:
    adapted = [site.path for site in plan.adapted]
    try:
        found = survey(make_twin(model), samples, adapted if graphs else [])
    except Exception as error:
        raise _ModelRefuses(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    sites = tuple(_with_backend(each, found) for each in plan.sites)
    return replace(plan, sites=sites, regions=_planned_regions(found), capture=Study(found, samples))


def _with_backend(each: PlannedSite, found: Survey) -> PlannedSite:
    in_graph = any(path in found.covered for path in each.site.paths)
    reason = "" if in_graph else _reason(each.path, found)
    site = replace(
        each.site,
        backend="graph" if in_graph else "module",
        backend_reason=reason,
        calls=found.calls.get(each.path, 0) if found.calls else None,
    )
    return replace(each, site=site)


def _reason(path: str, found: Survey) -> str:
    """Return why the site is in no graph: the failure of its innermost region."""
    if found.calls and not found.calls.get(path):
        return "never called as a module: its weight is read, or unused"
    owners = [region for region in found.failures if not region or f"{path}.".startswith(f"{region}.")]
    return found.failures[max(owners, key=len)] if owners else "outside of repeated blocks"


def _planned_regions(found: Survey) -> tuple[PlannedRegion, ...]:
    graphs = [PlannedRegion(path, "graph", found.failures.get(path, "")) for path in found.graphs]
    failed = [PlannedRegion(p, "module", why) for p, why in found.failures.items() if p not in found.graphs]
    return (*graphs, *failed)


def _without_inputs(plan: Plan, model: nn.Module) -> Plan:
    """Trace without inputs what is provably safe to trace so; the rest is module replacement."""
    found = survey_symbolically(make_twin(model), [site.path for site in plan.adapted])
    sites = tuple(_with_backend(each, found) for each in plan.sites)
    traced = replace(plan, sites=sites, regions=_planned_regions(found), capture=Study(found, ()))
    if all(site.backend == "graph" for site in traced.adapted):
        return traced
    return _noted(traced, "no example_inputs: only straight-line blocks are graphs; with inputs more of them would be")


def _noted(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))


def _on_device(samples: Sequence[Sample], model: nn.Module) -> tuple[Sample, ...]:
    """Return the samples on the meta device if the model is there."""
    return tuple(moved(each, torch.device("meta")) if is_meta(model) else each for each in samples)
