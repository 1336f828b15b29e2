"""From a plan to an adapted model: the twin, its adapters, its regions.  Writes, and never decides."""

import warnings
from collections.abc import Iterator, Sequence

from torch import fx, nn

from lora_fx.adapters.adapt import adapt_sites, own_what_is_trained
from lora_fx.adapters.attach import all_attached, record_of
from lora_fx.adapters.factors.spec import ModelRecord
from lora_fx.adapters.parallel import placed_beside, refuse_unplaceable
from lora_fx.adapters.placed import Placed, is_trained, placed_in
from lora_fx.adapters.starting import start_adapters, values_of
from lora_fx.adapters.trained import added_rows, added_tensors
from lora_fx.discovery.study import Study
from lora_fx.errors import CaptureError, LoraFxWarning, RefusedError
from lora_fx.liveness.heads import put_outermost
from lora_fx.models.collecting import collected_later
from lora_fx.models.fsdp import has_parts
from lora_fx.models.joining import joined
from lora_fx.models.tensors import get_tensor
from lora_fx.models.twin import make_twin
from lora_fx.models.wrappers import module_at, warn_of_cache_made_again
from lora_fx.passes.contract import rewrite
from lora_fx.passes.halve import HALVE
from lora_fx.passes.inject import Inject
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import NOT_RUN
from lora_fx.progress.steps import step
from lora_fx.regions.compiling import without_compiling
from lora_fx.regions.install import in_graphs, install, mark_last, stock, without_graph
from lora_fx.regions.program import LIVENESS, LOSS, OPTIMISATIONS, USUAL
from lora_fx.regions.survey import prove, trial_twin, without_gradient
from lora_fx.rules.inits import FROM_DATA
from lora_fx.text import listing
from lora_fx.tuned.heads import install_late
from lora_fx.tuned.invoking import find_invocations


@collected_later()
def build(model: nn.Module, plan: Plan, start: bool = True) -> nn.Module:
    """Return an adapted twin of the model as the plan says, with every site on the module backend.

    A GraphModule's own graph is rewritten; the model itself stays unchanged.  Without `start`, adapters that begin at
    parts of their weights have no values yet: they will be read from a file.
    """
    record = record_of(plan, model)
    twin = make_twin(model)
    if isinstance(twin, fx.GraphModule) and any(site.backend == "graph" for site in plan.adapted):
        rewrite(twin, Inject(plan, record))
    adapt_sites(twin, plan, record)
    refuse_unplaceable(twin)
    find_invocations(twin)
    own_what_is_trained(model, twin, record)
    if start:
        start_adapters(twin, plan, plan.first_values)
    return twin


def optimisations(optimise: bool | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the optimisations that are asked for.

    Raises:
        ValueError: there is no such optimisation; the message lists those that exist.
    """
    known = (*OPTIMISATIONS, LOSS, LIVENESS)
    wanted = (USUAL if optimise else ()) if isinstance(optimise, bool) else tuple(optimise)
    if isinstance(optimise, str) or not set(wanted) <= set(known):
        raise ValueError(f"optimise is {optimise!r}; it must be True, False, or names out of {', '.join(known)}")
    if HALVE in wanted and "recompute" not in wanted:
        raise ValueError('"halve" is about what "recompute" keeps: name both')
    return wanted


def install_graphs(twin: nn.Module, plan: Plan, passes: tuple[str, ...]) -> None:
    """Let submodules of the twin run as the graphs that the plan carries, proven on its samples in eval and train mode.

    A copy runs: nothing that a forward leaves behind in its model shows in the twin.
    """
    if not isinstance(plan.capture, Study):
        install_late(twin, (), (), passes)
        return
    survey, samples = plan.capture.survey, plan.capture.samples
    graphs = install_late(twin, samples, survey.graphs, passes)
    with step("making graphs"):
        install(twin, graphs, passes)
        put_outermost(twin)
        stock(twin, survey.library, survey.structures, survey.seconds)
        mark_last(twin)
    if samples and not has_parts(twin):  # what has no values here proves nothing
        # what is proven on a copy holds for the twin: they share their kinds
        with trial_twin(twin, freeze=False) as copy, step(total=5, share=4), without_compiling():
            prove(copy, samples)
            idle = without_gradient(copy, samples)
        mark_last(twin)  # programs that were known before are there only now
        called = {site.path for site in plan.adapted if site.calls != 0}
        if unreached := [path for path in idle if path in called]:
            warnings.warn(
                f"no gradient reaches the adapters of {listing(unreached)} on the example inputs: what runs there does "
                "not use them, or is cut off from the output",
                LoraFxWarning,
                stacklevel=4,
            )


def finished(twin: nn.Module, plan: Plan, backend: str) -> nn.Module:
    """Return the twin itself, in place sharded as its model is; warn where a planned graph could not be proven, or the
    model's checkpointing would meet a cache.

    Raises:
        CaptureError: backend="graph" and a site is in no graph.
        RefusedError: as `joined`.
    """
    _check_backend(twin, plan, backend)
    warn_of_cache_made_again(twin, level=5)
    return joined(placed_beside(twin))


def _check_backend(twin: nn.Module, plan: Plan, backend: str) -> None:
    own = {site.path for site in plan.adapted if site.backend == "graph" and isinstance(twin, fx.GraphModule)}
    covered, failed = own | in_graphs(twin), without_graph(twin)
    if failed:
        warnings.warn(f"these run without a graph, correct but slower: {failed}", LoraFxWarning, stacklevel=5)
    if backend != "graph":
        return
    outside = [(s.path, s.backend_reason) for s in plan.adapted if covered.isdisjoint(s.site.paths)]
    if outside:
        raise CaptureError(
            'backend="graph", but these sites are in no graph',
            outside,
            'backend="auto" adapts them by module replacement',
        )


def check_refusals(plan: Plan) -> None:
    """Raise RefusedError if nothing can be adapted or a rule's every match is refused; warn where only some are."""
    refused = [(site.path, site.reason) for site in plan.refused]
    effective = {site.rule for site in plan.adapted}
    without_effect = dict.fromkeys(str(site.rule) for site in plan.refused if site.rule not in effective)
    if without_effect:
        names = ", ".join(f"'{name}'" for name in without_effect)
        raise RefusedError(
            f"every site that rule {names} matches is refused", refused, "see lora_fx.plan(model, rules)"
        )
    values = values_of(plan.first_values)
    made = [(s.path, f"init {s.lora.init}") for s in plan.adapted if s.lora and s.lora.init in FROM_DATA]
    if missing := [fact for fact in made if fact[0] not in values]:
        advice = "plan = lora_fx.plan_from_data(model, rules, data), then lora_fx.apply(model, plan), in one process"
        raise RefusedError("first values of adapters are made from data, and were not", missing, advice)
    if not plan.adapted:
        raise RefusedError("the rules adapt no site of this model", advice="see lora_fx.plan(model, rules)")
    if refused:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in refused)
        warnings.warn(f"{len(refused)} matched sites are not adapted:\n{lines}", LoraFxWarning, stacklevel=4)
    for note in (note for note in plan.notes if note.startswith(NOT_RUN)):
        warnings.warn(f"{note}: give example_inputs, and more of it runs as graphs", LoraFxWarning, stacklevel=4)
    for caution in plan.cautions:
        warnings.warn(caution, LoraFxWarning, stacklevel=4)


def trainable(twin: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter that is to be trained, once: adapters, trained biases and rows, modules under `train:`."""
    left = frozen_factors(twin)
    return (parameter for parameter in held(twin) if id(parameter) not in left)


def frozen_factors(twin: nn.Module) -> set[int]:
    """Return the ids of every A that LoRA-FA leaves as it started: drawn like others, and not to be lost."""
    return {id(one.lora_A.weight) for _, one in all_attached(twin) if one.spec.lora.lora_fa}


def held(twin: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter that the model has beside its base, once: what is to be trained, and each frozen A."""
    record_in(twin)
    places, named = placed_in(twin), twin.named_parameters(remove_duplicate=False)
    adapters = [parameter for _, adapter in all_attached(twin) for parameter in adapter.parameters()]
    trained = [parameter for name, parameter in named if is_trained(name, places)]
    trained += [value for _, _, value in added_tensors(twin) if isinstance(value, nn.Parameter)]
    trained += [rows.rows for _, _, rows in added_rows(twin)]
    yield from {id(parameter): parameter for parameter in (*adapters, *trained)}.values()


def places_in(tuned: nn.Module) -> list[Placed]:
    """Return where each adapted model lies in this one; all that their records name of it is there.

    Raises:
        RefusedError: the model is not adapted, or lacks what was there.
    """
    record_in(tuned)
    places = placed_in(tuned)
    try:
        for place in places:
            for name in place.base():
                get_tensor(tuned, name)
            for path in place.trained():
                module_at(tuned, path)
    except (AttributeError, KeyError) as error:
        raise _not_whole(str(error.args[0])) from error
    return places


def whole_record_in(tuned: nn.Module) -> ModelRecord:
    """Return the record of an adapted model, in which all that it names must be.

    Raises:
        RefusedError: the model is not adapted, or is a part of the adapted one, or holds it.
    """
    first, *others = places_in(tuned)
    if first.there or first.here or others:
        what = f"it is {first.there.rstrip('.')} of it" if first.there else f"it holds one at {first.here.rstrip('.')}"
        raise _not_whole(what)
    return first.record


def _not_whole(what: str) -> RefusedError:
    advice = "give the model that lora_fx.apply or lora_fx.load returned"
    return RefusedError(f"this is not the whole adapted model, or more than that: {what}", advice=advice)


def record_in(twin: nn.Module) -> ModelRecord:
    """Return the record that an adapted model carries.

    Raises:
        RefusedError: if the model is not adapted.
    """
    for _, adapter in all_attached(twin):
        return adapter.spec.record
    raise RefusedError("the model is not adapted", advice="tuned = lora_fx.apply(model, rules) gives one that is")
