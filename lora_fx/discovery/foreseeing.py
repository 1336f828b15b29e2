"""What the optimisations will do to the sites and blocks of a plan, or why not."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lora_fx.adapters.fused.contraction import contraction_teller
from lora_fx.liveness.heads import named_head
from lora_fx.models.tensors import dotted
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedPass, PlannedSite
from lora_fx.planning.rows import LOSS_IF, told_passes
from lora_fx.regions.foresight import foreseen
from lora_fx.regions.program import LABELS, LOSS, USUAL
from lora_fx.regions.survey import Survey

Reasons = dict[str, str]
"""By the name of an optimisation why it is not done; empty where it is."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What will be done to a model; see `Foresight`."""

    sites: dict[str, Reasons] = field(default_factory=dict)
    """By the path of a fused site that is in a graph."""
    regions: dict[str, Reasons] = field(default_factory=dict)
    """By the path of a region that runs as graphs."""

    def passes_of(self, planned: PlannedSite) -> tuple[str, ...]:
        """Return what makes an adapted site cheaper to train."""
        if planned.decision != "adapt" or planned.not_fused:
            return ()
        done = {name for path in planned.site.paths for name, why in self.sites.get(path, {}).items() if not why}
        return ("fuse", *(name for name in USUAL if name in done))

    def by_name(self, region: str) -> tuple[PlannedPass, ...]:
        """Return what is done to a region by its name only."""
        return tuple(PlannedPass(name, why) for name, why in sorted(self.regions.get(region, {}).items()))

    def of_site(self, planned: PlannedSite) -> Iterator[str]:
        """Yield what is done to a site, and to the block that it is in, or why not, a line each."""
        reasons = {"fuse": planned.not_fused} if planned.decision == "adapt" else {}
        for path in planned.site.paths:
            reasons |= self.sites.get(path, {})
        if told := told_passes(reasons):
            yield f"in training: {told}"
        around = [region for region in self.regions if not region or f"{planned.path}.".startswith(f"{region}.")]
        if LOSS in planned.passes:
            yield f"by name: {LOSS_IF}"
        if planned.decision == "adapt" and planned.backend == "graph" and around:
            region = max(around, key=len)
            if told := told_passes({one.name: one.reason for one in self.by_name(region)}):
                yield f"by name, to {region or 'the model'}: {told}"


def foresee(captured: Survey, decisions: Decisions, model: nn.Module) -> Foreseen:
    """Return what will be done in the survey's graphs: what any graph of a block has, else why the first has it not."""
    adapted = {path: site for site in decisions.adapted for path in site.site.paths}
    found, known = Foreseen(), captured.foreseen
    for region, structure in captured.structures.items():
        block = model.get_submodule(region)
        inside = {name: adapted[path] for name, _ in block.named_modules() if (path := dotted(region, name)) in adapted}
        others = {name: site.not_fused for name, site in inside.items() if site.not_fused}
        fused = frozenset(name for name in inside.keys() - others.keys() if name)
        drops = any(site.lora is not None and site.lora.dropout for site in inside.values())
        for graph, _ in captured.library.get(structure, ()):
            known_of_it = found.regions.get(region, {})
            asked = not known_of_it or any(known_of_it.values())  # else another graph of it does all already
            key = (id(graph), fused, frozenset(others.items()), drops, asked)
            if key not in known:
                known[key] = None
                with contextlib.suppress(AttributeError):  # it reads what a forward makes first
                    known[key] = foreseen(graph, block, fused, others, drops, asked)
            if (seen := known[key]) is not None:
                _add(found.regions.setdefault(region, {}), seen.block)
                for name, reasons in seen.sites.items():
                    _add(found.sites.setdefault(dotted(region, name), {}), reasons)
    _keep_last(found.regions)
    return found


def _add(known: Reasons, more: Mapping[str, str]) -> None:
    for name, why in more.items():
        known[name] = known.get(name, why) and why


def _keep_last(regions: dict[str, Reasons]) -> None:
    """Leave what is for last blocks to the last of each row of blocks, whose paths differ in numbers only."""
    last = {".".join("*" if part.isdigit() else part for part in path.split(".")): path for path in regions}
    for path in regions.keys() - set(last.values()):
        regions[path].pop(LABELS, None)


def with_head(sites: tuple[PlannedSite, ...], model: nn.Module, captured: Survey) -> tuple[PlannedSite, ...]:
    """Return the sites, with "loss" among the passes of the layer that the model says makes its logits.

    Whether only a loss reads them is seen when that is asked for.
    """
    heads: set[str] = set()
    if "" not in captured.graphs:
        with contextlib.suppress(Exception):  # of the model's own method
            heads = set(named_head(model))
    return tuple(
        replace(site, passes=(*site.passes, LOSS)) if heads.intersection(site.site.paths) else site for site in sites
    )


def teller_of(plan: Plan, model: nn.Module) -> Callable[[PlannedSite], Iterator[str]]:
    """Return a function that says how a site will be computed, of a plan that was made of the model just now."""
    seen, order = getattr(plan.capture, "foreseen", None), contraction_teller(model)
    foreseen_there = seen if isinstance(seen, Foreseen) else Foreseen()

    def told(planned: PlannedSite) -> Iterator[str]:
        if contraction := order(planned):
            yield f"contraction: {contraction}"
        yield from foreseen_there.of_site(planned)

    return told
