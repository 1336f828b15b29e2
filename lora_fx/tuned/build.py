"""From a plan to an adapted model: the twin, its adapters, its regions.  Writes, and never decides."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from torch import fx, nn

from lora_fx.adapters.attach import all_attached, attach
from lora_fx.adapters.layers import adapt, count_calls_anew, read_by_kernels, stop_counting
from lora_fx.adapters.records import record_of, spec_of
from lora_fx.adapters.spec import ModelRecord
from lora_fx.errors import CaptureError, LoraFxWarning, RefusedError
from lora_fx.models.samples import Sample
from lora_fx.models.tensors import get_tensor, own_parameters
from lora_fx.models.twin import is_meta, make_twin
from lora_fx.passes.contract import apply_pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.inject import Inject
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedSite
from lora_fx.regions.install import in_graphs, install, regions, stock
from lora_fx.regions.program import OPTIMISATIONS
from lora_fx.regions.survey import Survey, run_modes, run_variants


def build(model: nn.Module, plan: Plan) -> nn.Module:
    """Return an adapted twin of the model as the plan says, with every site on the module backend.

    A GraphModule's own graph is rewritten; the model itself stays unchanged.
    """
    twin = make_twin(model)
    record = record_of(plan, model)
    _own_tensors(model, twin, record)
    if isinstance(twin, fx.GraphModule) and any(site.backend == "graph" for site in plan.adapted):
        _inject(twin, plan, record)
    _adapt_modules(twin, plan, record)
    return twin


def _own_tensors(model: nn.Module, twin: nn.Module, record: ModelRecord) -> None:
    """Give the twin values of its own for all that training will change, and keep the model's in the record."""
    record.base = {name: buffer.detach() for name, buffer in model.named_buffers(remove_duplicate=False)}
    names = [name for name, _ in twin.named_parameters(remove_duplicate=False) if _is_trained(name, record)]
    record.base |= {name: parameter.detach() for name in names if (parameter := get_tensor(model, name)) is not None}
    own_parameters(twin, names, requires_grad=True)


def _is_trained(name: str, record: ModelRecord) -> bool:
    return name.startswith(tuple(f"{path}." for path in record.trained))


def _inject(twin: fx.GraphModule, plan: Plan, record: ModelRecord) -> None:
    editor = Editor(twin)
    apply_pass(Inject(plan, record), editor)
    editor.finish()


def _adapt_modules(twin: nn.Module, plan: Plan, record: ModelRecord) -> None:
    in_graph = {path for path, _ in all_attached(twin)}
    kernels, in_code = read_by_kernels(twin), read_in_graph(twin)
    owners: dict[str, list[PlannedSite]] = {}
    for each in plan.adapted:
        if each.path not in in_graph:
            attach(twin.get_submodule(each.site.owner), spec_of(each, record, twin))
            owners.setdefault(each.site.owner, []).append(each)
    for path, sites in owners.items():
        read = [each for each in sites if _is_read(each) or path in kernels or each.site.weight in in_code]
        names = [each.site.weight.rpartition(".")[2] for each in read]
        adapt(twin.get_submodule(path), names, path in kernels)
    if any(found.call is not None for _, found in all_attached(twin)):
        twin.register_forward_pre_hook(count_calls_anew)
        twin.register_forward_hook(stop_counting, always_call=True)
    _train_biases(twin, record)


def _is_read(each: PlannedSite) -> bool:
    """Whether the weight must show itself adapted; where nothing has called its owner, whoever uses it may read it."""
    return each.site.read or bool(each.site.parameter) or each.calls == 0


def read_in_graph(model: nn.Module) -> set[str]:
    """Return the names of what the graph of a GraphModule reads; none of another model."""
    if not isinstance(model, fx.GraphModule):
        return set()
    return {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}


def _train_biases(twin: nn.Module, record: ModelRecord) -> None:
    for path, found in list(all_attached(twin)):
        bias = found.owner._parameters.get("bias") if found.spec.path_is_owner else None
        if found.spec.lora.bias and bias is not None and f"{path}.bias" not in record.base:
            record.base[f"{path}.bias"] = bias.detach()
            own_parameters(twin, [f"{path}.bias"], requires_grad=True)


def optimisations(optimise: bool | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the optimisations that are asked for.

    Raises:
        ValueError: a name is none; the message lists those that there are.
    """
    wanted = (OPTIMISATIONS if optimise else ()) if isinstance(optimise, bool) else tuple(optimise)
    unknown = [each for each in wanted if each not in OPTIMISATIONS]
    if unknown or isinstance(optimise, str):
        raise ValueError(
            f"optimise is {optimise!r}; it must be True, False, or names out of {', '.join(OPTIMISATIONS)}"
        )
    return wanted


def install_graphs(twin: nn.Module, survey: Survey, samples: Sequence[Sample], passes: tuple[str, ...]) -> None:
    """Let the surveyed submodules of the twin run as graphs, proven on the samples in eval and in train mode.

    A copy runs: nothing that a forward leaves behind in its model shows in the twin.
    """
    install(twin, survey.graphs, passes)
    stock(twin, survey.library, survey.structures, survey.seconds)
    if is_meta(twin) or not samples:
        return
    copy = make_twin(twin, freeze=False)  # what is proven on it holds for the twin: they share their kinds
    run_modes(copy, samples)
    run_variants(copy, samples)


def check_backend(twin: nn.Module, plan: Plan, backend: str) -> None:
    """Warn where a planned graph could not be proven; with backend="graph", refuse what is not in a graph."""
    covered = in_graphs(twin)
    failed = [
        (path, "; ".join(region.kind.failures.values()))
        for path, _, region in regions(twin)
        if not region.kind.programs and region.kind.failures
    ]
    if failed:
        warnings.warn(f"these run without a graph, correct but slower: {failed}", LoraFxWarning, stacklevel=4)
    if backend == "graph":
        outside = [
            (site.path, site.backend_reason)
            for site in plan.adapted
            if not (isinstance(twin, fx.GraphModule) and site.backend == "graph")
            and not covered.intersection(site.site.paths)
        ]
        if outside:
            raise CaptureError(
                'backend="graph", but these sites are in no graph',
                outside,
                'backend="auto" adapts them by module replacement',
            )


def check_refusals(plan: Plan) -> None:
    """Raise if nothing can be adapted or a rule's every match is refused; warn where only some are."""
    refused = [(site.path, site.reason) for site in plan.refused]
    effective = {site.rule for site in plan.adapted}
    without_effect = dict.fromkeys(str(site.rule) for site in plan.refused if site.rule not in effective)
    if without_effect:
        names = ", ".join(f"'{name}'" for name in without_effect)
        raise RefusedError(
            f"every site that rule {names} matches is refused", refused, "see lora_fx.plan(model, rules)"
        )
    if not plan.adapted:
        raise RefusedError("the rules adapt no site of this model", advice="see lora_fx.plan(model, rules)")
    if refused:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in refused)
        warnings.warn(f"{len(refused)} matched sites are not adapted:\n{lines}", LoraFxWarning, stacklevel=4)
    for caution in plan.cautions:
        warnings.warn(caution, LoraFxWarning, stacklevel=4)


def trainable(twin: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter that is to be trained, once: adapters, trained biases, modules under `train:`."""
    seen: set[int] = set()
    for tensor in (*_adapter_parameters(twin), *_trained_parameters(twin)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _adapter_parameters(twin: nn.Module) -> Iterator[nn.Parameter]:
    for _, found in all_attached(twin):
        yield from found.parameters()


def _trained_parameters(twin: nn.Module) -> Iterator[nn.Parameter]:
    record = record_in(twin)
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if _is_trained(name, record):
            yield parameter


def record_in(twin: nn.Module) -> ModelRecord:
    """Return the record that an adapted model carries.

    Raises:
        RefusedError: if the model is not adapted.
    """
    for _, found in all_attached(twin):
        return found.spec.record
    raise RefusedError("the model is not adapted", advice="tuned = lora_fx.apply(model, rules) gives one that is")
