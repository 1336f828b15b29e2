"""What a model is made of and which parts of it run as graphs: everything that a plan rests on."""

import contextlib
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.capture.captured import NotCaptured
from lora_fx.capture.symbolic import capture_symbolically
from lora_fx.discovery.foreseeing import Foreseen, foresee, with_head
from lora_fx.discovery.looks import LOOKS, Look
from lora_fx.discovery.sites import refuse_unfit, take_inventory, uses_in, uses_in_graph
from lora_fx.discovery.weight_uses import NOTHING_SHOWN, Uses, WeightUse, weight_uses
from lora_fx.errors import CaptureError, RefusedError
from lora_fx.models.code import UncompiledGraph
from lora_fx.models.joining import outline
from lora_fx.models.layers import has_unknown_weights
from lora_fx.models.samples import Sample, Samples, candidates, samples_for, without_values
from lora_fx.models.tensors import dotted
from lora_fx.models.walking import modules_of, set_eval
from lora_fx.planning.decide import check_used, decide, on_modules, still_fitting
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import DEAD, NOT_RUN, Inventory, PlannedRegion, PlannedSite
from lora_fx.progress.steps import left_out, step
from lora_fx.regions.survey import Survey, survey, survey_symbolically, trial_twin
from lora_fx.rules.reader import read_rules

_ON_META = "; this is the meta device: with values it may run, and more of it as graphs"
_MORE_WITH_INPUTS = "no example_inputs: only straight-line blocks are graphs; with inputs more of them would be"


CAPTURING = 20
"""The share of a call that capturing takes, where running the samples takes 1."""


@dataclass(frozen=True, slots=True)
class Study:
    """What was captured while planning; a plan carries it so that `apply` need not capture again."""

    survey: Survey
    samples: tuple[Sample, ...]
    foreseen: Foreseen


@dataclass(frozen=True, slots=True)
class Observed:
    """A model with what is known of it before anything is decided: all that plans for it rest on."""

    model: nn.Module
    inventory: Inventory
    samples: tuple[Sample, ...] = ()
    """Empty where there are none, or where the model does not run on them here."""
    note: str = ""
    """Why it could not be watched while it ran, or not run."""
    look: Look | None = None
    """What is known of it from now on; None where changes to it could not be told."""

    def planned(self, decisions: Decisions, backend: str = "auto") -> Plan:
        """Return the plan of what is decided, with each site's backend: "modules" captures nothing.

        The model stays unchanged.
        """
        if backend == "modules":
            left_out(CAPTURING)
            return on_modules(decisions)
        if (in_graph := self.inventory.in_graph) is not None:
            return on_modules(decisions, in_graph, "inside a module that the graph calls as a whole")
        notes = (*decisions.notes, self.note) if self.note else decisions.notes
        return self._with_captures(decisions, notes) if decisions.adapted else Plan.of(decisions, notes=notes)

    def _with_captures(self, decisions: Decisions, notes: tuple[str, ...]) -> Plan:
        """Return the plan with the graphs that are captured; without samples, those that are provably safe to trace."""
        captured = self._surveyed([site.path for site in decisions.adapted])
        seen = foresee(captured, decisions, self.model)
        sites = tuple(_with_backend(site, captured, seen) for site in decisions.sites)
        if not self.samples and any(site.decision == "adapt" and site.backend == "module" for site in sites):
            notes = (*notes, _MORE_WITH_INPUTS)
        regions = tuple(
            PlannedRegion(
                path,
                "graph" if path in captured.graphs else "module",
                captured.failures.get(path, ""),
                seen.by_name(path),
            )
            for path in dict.fromkeys((*captured.graphs, *captured.failures))
        )
        sites, capture = with_head(sites, self.model, captured), Study(captured, self.samples, seen)
        return Plan.of(decisions, sites=sites, notes=notes, regions=regions, capture=capture)

    def _surveyed(self, wanted: list[str]) -> Survey:
        """Return which submodules run as graphs, as it is known or found out now."""
        if self.look is not None and (captured := self.look.survey(wanted)) is not None:
            left_out(CAPTURING)
            return captured
        with trial_twin(self.model) as twin, step(total=10, share=CAPTURING):
            captured = survey(twin, self.samples, wanted) if self.samples else survey_symbolically(twin, wanted)
        if self.look is not None:
            self.look.keep(wanted, captured)
        return captured


def observed(
    model: nn.Module, tried: Samples, known: Mapping[str, WeightUse] | None = None, graphs: bool = True
) -> Observed:
    """Return the model with how it uses its weights, seen in a run of each sample in eval mode; it stays unchanged.

    A twin runs.  Without samples, and for a GraphModule, nothing runs; `known` tells how raw parameters are used where
    no run shows it.  What was found out about the same model and inputs, as long as nothing has changed, is not again.
    Without `graphs`, nothing is kept where to find it again costs less than to see that nothing has changed.

    Raises:
        RefusedError: the model cannot be adapted at all.
        CaptureError: the model refuses the user's own inputs.
    """
    refuse_unfit(model)
    hides = any(map(has_unknown_weights, modules_of(model)))
    state = LOOKS.state(model, tried) if not known and (graphs or tried.items or hides) else None
    if state is not None and (look := LOOKS.of(model, state)) is not None:
        left_out(1)
        return Observed(model, look.inventory, tried.items if look.runs else (), look.note, look)
    model, tried = _outlined(model, tried)
    uses, samples, note = None, tried.items, ""
    runs = not isinstance(model, fx.GraphModule)
    if samples and runs:
        attempts = (_shown_by(model, replace(tried, items=items)) for items in candidates(model, tried))
        with step(total=None):
            first = next(attempts)
            uses, samples, note = first if first[1] else next((other for other in attempts if other[1]), first)
    if uses is None and runs and hides and (samples or not note):
        uses = _symbolic_uses(model)
    if known:
        uses = uses or NOTHING_SHOWN
        uses = replace(uses, weights={**known, **uses.weights})
    inventory = take_inventory(model, uses)
    if state is None or (samples and samples is not tried.items):
        return Observed(model, inventory, samples, note)
    return Observed(model, inventory, samples, note, LOOKS.learn(model, state, inventory, bool(samples), note))


def _outlined(model: nn.Module, tried: Samples) -> tuple[nn.Module, Samples]:
    """Return both as they are; of a model that is sharded its outline, which has no values, and so samples without."""
    plain = outline(model)
    return plain, tried if plain is model else without_values(tried)


def _shown_by(model: nn.Module, tried: Samples) -> tuple[Uses | None, tuple[Sample, ...], str]:
    """Return what a run of the samples shows, the samples themselves if the model runs on them, and a note if not so.

    Raises:
        RefusedError, CaptureError: as `observed`.
    """
    try:
        return _watched_uses(model, tried.items), tried.items, ""
    except RefusedError:
        raise
    except Exception as unwatched:
        return None, *_unwatched(model, tried, unwatched)


def _unwatched(model: nn.Module, tried: Samples, unwatched: Exception) -> tuple[tuple[Sample, ...], str]:
    """Return the samples if the model runs on them unwatched, none if it does not run at all; and a note on why.

    Raises:
        CaptureError: the model refuses the user's own inputs.
    """
    torch.compiler.reset()  # torch.cond compiles; what it has compiled under a mode would fail without one too
    try:
        with _trial_in_inference(model) as twin:
            for sample in tried.items:
                twin(*sample.args, **sample.kwargs)
        return tried.items, f"how weights are used cannot be watched: {_line(unwatched)}"
    except Exception as error:
        reason = _line(error)
        if tried.given and not tried.on_meta:
            raise CaptureError(
                "the model refuses the example inputs", [("(root)", reason)], "check example_inputs"
            ) from error
        return (), f"{NOT_RUN}: {reason}{_ON_META if tried.on_meta else ''}"


def _watched_uses(model: nn.Module, samples: Sequence[Sample]) -> Uses:
    """Return what all samples show: the calls of the first, and every weight that any of them uses, or reads."""
    shown = []
    with _trial_in_inference(model) as twin, step("watching a run", len(samples), "samples") as doing:
        for sample in samples:
            shown.append(weight_uses(twin, sample.args, sample.kwargs))
            doing.advance()
    weights = ChainMap(*(uses.weights for uses in shown))
    read = {name for uses in shown for name, use in uses.weights.items() if use.outside}
    calls = dict(ChainMap(*(uses.calls for uses in shown)))
    return Uses(calls, {name: replace(use, outside=name in read) for name, use in weights.items()})


@contextlib.contextmanager
def _trial_in_inference(model: nn.Module) -> Iterator[nn.Module]:
    with trial_twin(model) as twin, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_eval(twin)
        yield twin


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _symbolic_uses(model: nn.Module) -> Uses:
    """Return how modules use the raw parameters that they own, as far as straight-line forwards tell without inputs."""
    weights: dict[str, WeightUse] = {}
    looked_at: set[str] = set()
    with trial_twin(model) as twin:
        for path, module in ((path, module) for path, module in twin.named_modules() if has_unknown_weights(module)):
            with contextlib.suppress(NotCaptured):
                graph_module = UncompiledGraph(module, capture_symbolically(module).graph)
                weights |= uses_in_graph(graph_module, path)
                looked_at |= {dotted(path, name) for name in module._parameters}
    return Uses({}, weights, complete=False, looked_at=frozenset(looked_at))


def renewed(model: nn.Module, plan: Plan, tried: Samples, backend: str = "auto") -> Plan:
    """Return a plan that was made before, if it still fits the model, with graphs unless the backend is "modules".

    Of the inputs the user's own count; a plan that has its captures does not need them.

    Raises:
        StalePlanError: the model has other sites, uses them otherwise, or the plan says what its rules do not.
        CaptureError: the plan has graphs of another process, and there are no inputs to capture them again.
    """
    seen = Observed(outline(model), take_inventory(model, uses_in(plan)))
    decisions = still_fitting(plan, seen.inventory)
    if backend != "modules" and not tried.given:
        if plan.capture is not None:
            left_out(1 + CAPTURING)
            return plan
        if plan.regions:
            raise CaptureError(
                "the plan has graphs, which were captured in another process",
                advice='give the example_inputs again, or backend="modules"',
            )
    if tried.given:
        seen = observed(model, tried)
        check_used(decisions, seen.inventory)
    return seen.planned(decisions, backend)


def planned_for(model: nn.Module, rules_or_plan: Any, example_inputs: object, backend: str) -> Plan:
    """Return a plan that fits the model, by rules or renewed, with graphs where the backend wants them.

    The arguments are those of `lora_fx.apply`.

    Raises:
        ValueError: there is no such backend.
        LoraFxError: as `renewed`, `observed` and `decide`.
    """
    if backend not in ("auto", "graph", "modules"):
        raise ValueError(f"backend is {backend!r}; it must be 'auto', 'graph' or 'modules'")
    wanted = rules_or_plan if isinstance(rules_or_plan, Plan) else read_rules(rules_or_plan)
    tried = samples_for(model, example_inputs)
    if isinstance(wanted, Plan):
        return replace(renewed(model, wanted, tried, backend), first_values=wanted.first_values)
    seen = observed(model, tried, graphs=backend != "modules")
    return seen.planned(decide(wanted, seen.inventory), backend)


def _with_backend(site: PlannedSite, captured: Survey, seen: Foreseen) -> PlannedSite:
    """Return the planned site with how it is computed: its backend, and what makes it cheaper to train."""
    in_graph = not captured.covered.isdisjoint((*site.site.paths, site.site.weight))
    return replace(
        site,
        backend="graph" if in_graph else "module",
        backend_reason="" if in_graph else _reason(site, captured),
        passes=seen.passes_of(site),
    )


def _reason(site: PlannedSite, captured: Survey) -> str:
    """Return why the site is in no graph: what its innermost region came to."""
    if site.calls == 0:
        return DEAD
    regions = (*captured.failures, *captured.graphs)
    owners = [region for region in regions if not region or f"{site.path}.".startswith(f"{region}.")]
    if not owners:
        return "outside of repeated blocks"
    innermost = max(owners, key=len)
    return captured.failures.get(innermost) or _called_whole(site, innermost, captured)


def _called_whole(site: PlannedSite, region: str, captured: Survey) -> str:
    """Return why the graphs of the region around a site do not compute it."""
    below = f"{site.path}."[len(region) + bool(region) :]
    for graph, _ in captured.library[captured.structures[region]]:
        for node in graph.graph.nodes:
            if node.op == "call_module" and below.startswith(f"{node.target}."):
                why = graph.dependencies.retreats.get(str(node.target), "it has hooks, or a forward of its own")
                return (
                    f"the graph of {region or 'the model'} calls {dotted(region, str(node.target))} as a whole: {why}"
                )
    return f"each graph of {region or 'the model'} is for one size only"
