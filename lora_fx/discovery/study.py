"""What a model is made of and which parts of it run as graphs: everything that a plan rests on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from lora_fx.capture.captured import NotCaptured
from lora_fx.capture.symbolic import capture_symbolically
from lora_fx.discovery.sites import has_unknown_weights, refuse_unfit, uses_in_graph
from lora_fx.discovery.weight_uses import Uses, WeightUse, weight_uses
from lora_fx.errors import CaptureError, RefusedError
from lora_fx.models.samples import Sample, dummy_samples, moved, samples_of
from lora_fx.models.tensors import dotted
from lora_fx.models.twin import is_meta, make_twin
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import DEAD, PlannedRegion, PlannedSite, not_fused
from lora_fx.regions.program import OPTIMISATIONS, foreseen
from lora_fx.regions.survey import Survey, survey, survey_symbolically, unchanged_modes, unchanged_random


@dataclass(frozen=True, slots=True)
class Study:
    """What was captured while planning; a plan carries it so that `apply` need not capture again."""

    survey: Survey
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Observed:
    """What a first run of the model has shown, before anything is decided."""

    samples: tuple[Sample, ...]
    """Empty where there are none, or where the model does not run on them here."""
    uses: Uses | None = None
    note: str = ""


def observed(model: nn.Module, example_inputs: object) -> Observed:
    """Return how the model uses its weights, seen in a run of each sample in eval mode; the model stays unchanged.

    A twin runs.  Without samples, and for a GraphModule, nothing runs.

    Raises:
        CaptureError: if the user's own inputs are of a wrong kind or the model refuses them.
    """
    refuse_unfit(model)
    given = None if example_inputs is None else samples_of(example_inputs)
    if isinstance(model, fx.GraphModule):
        return Observed(given or ())
    samples = given or dummy_samples(model)
    if samples is None:
        return Observed((), _symbolic_uses(model))
    samples = _on_device(samples, model)
    try:
        return Observed(samples, _uses(make_twin(model), samples))
    except RefusedError:
        raise
    except Exception as unwatched:
        return _unwatched(model, samples, given is not None, unwatched)


def _unwatched(model: nn.Module, samples: tuple[Sample, ...], given: bool, unwatched: Exception) -> Observed:
    """Return what is known of a model that does not run while its kernels are watched, or not at all."""
    torch.compiler.reset()  # torch.cond compiles; what it has compiled under a mode would fail without one too
    try:
        with _as_in_inference(twin := make_twin(model)):
            for sample in samples:
                twin(*sample.args, **sample.kwargs)
        return Observed(samples, _symbolic_uses(model), f"how weights are used cannot be watched: {_line(unwatched)}")
    except Exception as error:
        reason = _line(error)
        if given and not is_meta(model):
            raise CaptureError(
                "the model refuses the example inputs", [("(root)", reason)], "check example_inputs"
            ) from error
        return Observed((), None, f"the model does not run on its sample inputs here: {reason}")


def _uses(twin: nn.Module, samples: Sequence[Sample]) -> Uses:
    """Return what all samples show: the calls of the first, and every weight that any of them uses."""
    found: list[Uses] = []
    with _as_in_inference(twin):
        for sample in samples:
            found.append(weight_uses(twin, sample.args, sample.kwargs))
    calls = {path: number for each in reversed(found) for path, number in each.calls.items()}
    return Uses(calls, {name: use for each in reversed(found) for name, use in each.weights.items()})


@contextlib.contextmanager
def _as_in_inference(twin: nn.Module) -> Iterator[None]:
    with unchanged_modes(twin), unchanged_random(twin), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.eval()
        yield


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _symbolic_uses(model: nn.Module) -> Uses | None:
    """Return how modules use the raw parameters that they own, as far as straight-line forwards tell without inputs."""
    owners = [path for path, module in model.named_modules() if has_unknown_weights(module)]
    if not owners:
        return None
    weights: dict[str, WeightUse] = {}
    looked_at: set[str] = set()
    twin = make_twin(model)
    for path in owners:
        module = twin.get_submodule(path)
        with contextlib.suppress(NotCaptured):
            graph_module = fx.GraphModule(module, capture_symbolically(module).graph)
            weights |= uses_in_graph(graph_module, path)
            looked_at |= {dotted(path, name) for name in module._parameters}
    return Uses({}, weights, complete=False, looked_at=frozenset(looked_at))


def studied(plan: Plan, model: nn.Module, seen: Observed, graphs: bool = True) -> Plan:
    """Return the plan with each site's backend, found by running the model on samples; it stays unchanged.

    Args:
        plan: a plan for the model.
        model: the model.
        seen: what a first run of it has shown.
        graphs: whether to capture graphs.
    """
    if seen.note:
        plan = _noted(plan, seen.note)
    if isinstance(model, fx.GraphModule) or not plan.adapted:
        return plan
    if not seen.samples:
        return _without_inputs(plan, model) if graphs else plan
    wanted = [site.path for site in plan.adapted] if graphs else []
    found = survey(make_twin(model), seen.samples, wanted)
    return _surveyed(plan, model, found, seen.samples)


def _surveyed(plan: Plan, model: nn.Module, found: Survey, samples: tuple[Sample, ...]) -> Plan:
    """Return the plan with what a survey of the model has found of each site and region."""
    passes = foreseen_passes(found, plan, model)
    sites = tuple(_with_passes(_with_backend(each, found), passes) for each in plan.sites)
    return replace(plan, sites=sites, regions=_planned_regions(found), capture=Study(found, samples))


def foreseen_passes(found: Survey, plan: Plan, model: nn.Module) -> dict[str, set[str]]:
    """Return what the optimisations will do at each fused site of the plan, by its path, in the survey's graphs."""
    fused = {path for each in plan.adapted if not not_fused(each) for path in each.site.paths}
    passes: dict[str, set[str]] = {}
    known: dict[tuple[int, frozenset[str]], dict[str, set[str]]] = {}
    for path, structure in found.structures.items():
        block = model.get_submodule(path)
        inside = frozenset(name for name, _ in block.named_modules() if name and dotted(path, name) in fused)
        for captured, _ in found.library.get(structure, ()):
            key = (id(captured), inside)
            if key not in known:
                known[key] = {}
                with contextlib.suppress(AttributeError):  # it reads what a forward makes first
                    known[key] = foreseen(captured, block, inside)
            for name, does in known[key].items():
                passes.setdefault(dotted(path, name), set()).update(does)
    return passes


def _with_passes(each: PlannedSite, passes: Mapping[str, set[str]]) -> PlannedSite:
    if each.decision != "adapt" or not_fused(each):
        return each
    does = {"fuse"}.union(*(passes.get(path, set()) for path in each.site.paths))
    return replace(each, passes=tuple(name for name in ("fuse", *OPTIMISATIONS) if name in does))


def _with_backend(each: PlannedSite, found: Survey) -> PlannedSite:
    in_graph = any(path in found.covered for path in (*each.site.paths, each.site.weight))
    reason = "" if in_graph else _reason(each, found)
    return replace(each, backend="graph" if in_graph else "module", backend_reason=reason)


def _reason(each: PlannedSite, found: Survey) -> str:
    """Return why the site is in no graph: the failure of its innermost region."""
    if each.calls == 0:
        return DEAD
    owners = [region for region in found.failures if not region or f"{each.path}.".startswith(f"{region}.")]
    return found.failures[max(owners, key=len)] if owners else "outside of repeated blocks"


def _planned_regions(found: Survey) -> tuple[PlannedRegion, ...]:
    graphs = [PlannedRegion(path, "graph", found.failures.get(path, "")) for path in found.graphs]
    failed = [PlannedRegion(p, "module", why) for p, why in found.failures.items() if p not in found.graphs]
    return (*graphs, *failed)


def _without_inputs(plan: Plan, model: nn.Module) -> Plan:
    """Trace without inputs what is provably safe to trace so; the rest is module replacement."""
    found = survey_symbolically(make_twin(model), [site.path for site in plan.adapted])
    traced = _surveyed(plan, model, found, ())
    if all(site.backend == "graph" for site in traced.adapted):
        return traced
    return _noted(traced, "no example_inputs: only straight-line blocks are graphs; with inputs more of them would be")


def _noted(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))


def _on_device(samples: Sequence[Sample], model: nn.Module) -> tuple[Sample, ...]:
    """Return the samples on the meta device if the model is there."""
    return tuple(moved(each, torch.device("meta")) if is_meta(model) else each for each in samples)
