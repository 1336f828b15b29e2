"""The public functions.  Each reads like a table of contents: what is checked, what is made, what comes back."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from lora_fx import exporters
from lora_fx.adapters.attach import with_values
from lora_fx.discovery.foreseeing import teller_of
from lora_fx.discovery.study import CAPTURING, observed, planned_for
from lora_fx.files.adapter import restore
from lora_fx.files.adapter.read import read_adapters
from lora_fx.files.checkpoint import streaming
from lora_fx.files.checkpoint.report import MergeReport
from lora_fx.files.checkpoint.rounding import Rounding
from lora_fx.graphdiff.deltas.audit import Audit, audit_of
from lora_fx.graphdiff.deltas.measure import Deltas, delta_row, deltas_of
from lora_fx.graphdiff.diff import GraphDiff
from lora_fx.graphdiff.graphs import Graph
from lora_fx.graphdiff.models import Comparable, graph_diff, graph_of
from lora_fx.integrations.loaded import twin_of
from lora_fx.integrations.pretrained import take_over
from lora_fx.models.modes import making
from lora_fx.models.samples import samples_for
from lora_fx.models.wrappers import seen_through
from lora_fx.planning import explain as explaining
from lora_fx.planning.decide import decide
from lora_fx.planning.plan import Plan
from lora_fx.progress.steps import ShowProgress, counting
from lora_fx.rules.peftwords import answering_peft
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet
from lora_fx.rules.short import Target, rules_or_short
from lora_fx.tuned import build, requantise, switching, undo
from lora_fx.tuned import extract as extraction
from lora_fx.tuned.report import Report, report
from lora_fx.tuned.several import only
from lora_fx.tuned.switching import Adapters

Rules: TypeAlias = str | os.PathLike[str] | Mapping[str, object] | RuleSet
ChosenBackend: TypeAlias = Literal["auto", "graph", "modules"]


@answering_peft
def plan(
    model: nn.Module,
    rules: Rules | None = None,
    example_inputs: object = None,
    *,
    target: Target | None = None,
    r: int | None = None,
    alpha: float | None = None,
    progress: ShowProgress = None,
) -> Plan:
    """Return what `apply` would do to every site of the model, and why; nothing is changed.

    Needs no weights: a model on the meta device will do.

    Args:
        model: any nn.Module, or a torch.fx.GraphModule.
        rules: path of a YAML file, name of a shipped one (`attention`), a dict, or a RuleSet.
        example_inputs: a tuple (positional), a dict (keyword), a `lora_fx.call(...)`, or a list of these; shows which
            parts run as graphs, and how often each weight is used.
        target: in place of rules: the name of a shipped file, or a glob, or several; one without a dot and a wildcard
            (`q_proj`) means modules of that name anywhere.  None: `attention`.
        r: rank at every site, in place of the shipped file's.
        alpha: None is 2 · r.
        progress: what shows how far it is.  None: a line on a terminal, once it takes over two seconds; True: always;
            False: never; or a function that is called with (done, total, what).

    Raises:
        RuleError: the rules cannot be read; names every problem with line and column.
        NoMatchError: a rule matches nothing, or not what it expects; names every such rule.
        CaptureError: the model refuses the example inputs.
        RefusedError: the model is adapted already, compiled, or cannot be copied.
    """
    read = read_rules(rules_or_short(rules, target, r, alpha))
    with making("plan", progress, 1 + CAPTURING):
        seen = observed(model, samples_for(model, example_inputs))
        return seen.planned(decide(read, seen.inventory))


def explain(
    model: nn.Module, path: str, rules: Rules, example_inputs: object = None, *, progress: ShowProgress = None
) -> str:
    """Return as text why the sites at a path are adapted by the rules or not: what each rule says, and the facts.

    Args:
        model: as for `plan`, as are `rules`, `example_inputs` and `progress`; nothing is changed.
        path: name of a site, one of its aliases, a glob, or a module with sites in it.

    Raises:
        UnknownPathError: nothing bears the name; a ValueError that tells the nearest names.
        RuleError, CaptureError, RefusedError: as `plan`; a rule that matches nothing is not an error here.
    """
    read = read_rules(rules)
    with making("explain", progress, 1 + CAPTURING):
        seen = observed(model, samples_for(model, example_inputs))
        plan = seen.planned(decide(read, seen.inventory, strict=False))
    return explaining.explain(plan, read, seen.inventory, path, teller_of(plan, model))


@answering_peft
def apply(
    model: nn.Module,
    rules_or_plan: Rules | Plan | None = None,
    example_inputs: object = None,
    backend: ChosenBackend = "auto",
    optimise: bool | Sequence[str] = True,
    *,
    target: Target | None = None,
    r: int | None = None,
    alpha: float | None = None,
    progress: ShowProgress = None,
) -> nn.Module:
    """Return an adapted twin of the model; the model itself stays unchanged, and no weight is copied.

    The twin has the model's class, methods and state-dict keys; its base parameters share the model's storage and are
    frozen; `lora_A` and `lora_B` stand beside each adapted weight.  With B = 0 it computes what the model computes,
    bit by bit.

    Args:
        model: any nn.Module; a torch.fx.GraphModule comes back as a GraphModule with the LoRA nodes in its graph.
        rules_or_plan: rules as for `plan`, or a Plan.
        example_inputs: as for `plan`; with a Plan made from inputs in this process they are known already.
        backend: "auto" runs blocks as guarded graphs where that is proven right and replaces modules elsewhere;
            "graph" refuses what is in no graph; "modules" captures nothing.
        optimise: whether graphs are cheaper to train by "stack" (siblings share one product by A) and "recompute"
            (cheap inputs are not kept), or names, also "loss" (logits that only a loss reads are never whole), "halve"
            (activations in bfloat16), "attention" (not kept), "compile", "liveness" (no padding).  Calls may round.
        target: in place of rules, as for `plan`, as are `r`, `alpha` and `progress`: `apply(model, r=8, target="*")`.

    Raises:
        StalePlanError: the plan was made for another model.
        RefusedError: nothing can be adapted, or a rule's every match is refused.
        CaptureError: backend="graph" and a site is in no graph.
        RuleError, NoMatchError: as `plan`.
    """
    passes = build.optimisations(optimise)
    wanted = rules_or_short(rules_or_plan, target, r, alpha)
    with making("apply", progress, 7 + CAPTURING):
        plan = planned_for(model, wanted, example_inputs, backend)
        build.check_refusals(plan)
        twin = take_over(build.build(model, plan))
        build.install_graphs(twin, plan, passes)
        return build.finished(twin, plan, backend)


def inspect(tuned: nn.Module) -> Report:
    """Return what an adapted model is made of: its sites, regions with hits and misses, and parameter counts."""
    return report(seen_through(tuned))


def disabled(tuned: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the adapted model computes what its base computes, bit by bit; the same object."""
    return undo.disabled(seen_through(tuned))


@answering_peft
def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    example_inputs: object = None,
    optimise: bool | Sequence[str] = True,
    *,
    progress: ShowProgress = None,
) -> nn.Module:
    """Return an adapted twin of the model with the adapters of a directory; the model itself stays unchanged.

    Reads what `save` and PEFT write.  Files and model are checked against each other before anything is made.  Of
    several adapters in the directory the first is in use, and those that share no weight with it or each other;
    `lora_fx.use` chooses among all.  `example_inputs`, `optimise` and `progress` are as for `apply`.

    Raises:
        AdapterFileError: missing, damaged or contradictory files.
        AdapterMismatchError: sites that the model has not or has in other shapes, or another base.
        RefusedError: a site that cannot be adapted.
    """
    passes = build.optimisations(optimise)
    with making("load", progress, 9 + CAPTURING):
        return twin_of(model, *restore.fitted(directory, model, samples_for(model, example_inputs)), passes)


def diff(
    a: Comparable, b: Comparable, example_inputs: object = None, *, trust: bool = False, progress: ShowProgress = None
) -> GraphDiff:
    """Return how two graphs differ, grouped by site; falsy if they do not.  Values of weights are not compared.

    Args:
        a: a model, a torch.fx.GraphModule, an ExportedProgram, a graph from `lora_fx.graph`, or the path of a `.pt2`
            file or of a saved graph.
        b: the same, of any of these kinds; both stay unchanged.
        example_inputs: as for `plan`; shows the blocks of models that hold no graphs yet, which are otherwise compared
            module by module.
        trust: that reading a `.pt2` file may run code of whoever wrote it; without it such a file is refused.
        progress: as for `plan`.

    Raises:
        LoraFxError: a file cannot be read, or is a program and not trusted.
        CaptureError: a model refuses the example inputs.
    """
    with making("diff", progress, 2):
        return graph_diff(a, b, example_inputs, trust)


def graph(model: Comparable, example_inputs: object = None, *, trust: bool = False) -> Graph:
    """Return the graph of a model as data that can be saved, read back without torch, and given to `diff`.

    Args:
        model: as for `diff`.
        example_inputs: as for `diff`.
        trust: as for `diff`.
    """
    return graph_of(model, example_inputs, trust)


def deltas(tuned: nn.Module) -> Deltas:
    """Return norms and singular values of every adapter's ΔW = scaling · B A; the adapted model stays unchanged.

    B A is never formed: the singular values are those of an r × r matrix.

    Raises:
        RefusedError: the model is not adapted, or its adapters have no values.
    """
    return deltas_of(with_values(seen_through(tuned)))


def audit(adapter: nn.Module | str | os.PathLike[str]) -> Audit:
    """Return what stands out in an adapter: norms, outlying sites, how few sites and directions have its energy.

    Facts, not a verdict.  Neither needs nor changes a base model.

    Args:
        adapter: an adapted model, or the directory of an adapter.

    Raises:
        AdapterFileError: the directory's files are missing, damaged or of another kind.
        RefusedError: the model is not adapted, or its adapters have no values.
    """
    if isinstance(adapter, nn.Module):
        trained = deltas(adapter)
        return audit_of(trained.model, trained.sites)
    files = read_adapters(adapter)
    rows = [
        replace(row, adapter=site.lora.adapter if len(files) > 1 else "")
        for file in files
        for site in file.sites
        for row in [delta_row(site.path, site.rule, site.lora.r, site.lora.scaling, *site.matrices(), site.call)]
    ]
    return audit_of(os.fspath(adapter), rows, sum(tensor.numel() for tensor in files[0].modules.values()))


def merge(
    tuned: nn.Module,
    *,
    adapters: Adapters = None,
    requantize: requantise.Quantise | None = None,
    progress: ShowProgress = None,
) -> nn.Module:
    """Return a plain model of the original class with adapters folded in; the adapted model stays unchanged.

    W' = W + Σ weight · scaling · B A, accumulated in float32 and rounded once, in a new parameter: what shares the base
    weight keeps it.  The result needs no lora_fx.  Of a quantised weight W are the numbers that it stands for, and W'
    is a plain parameter.  A model that FSDP2 shards is merged part by part, and comes back sharded.

    Args:
        tuned: an adapted model.
        adapters: as for `lora_fx.use`: a name, several, or a dict of weights; None folds what is in use.
        requantize: quantises a module in place; is given each merged layer whose weight was quantised.  A LoraFxWarning
            says how much of the adapter that takes; `lora_fx.merged_and_requantised` returns it.
        progress: as for `plan`.

    Raises:
        MergeError: a merged weight would not be finite; names every such site, and nothing is merged.
        ValueError, RefusedError: as `lora_fx.use`; ValueError also for a `requantize` that is no function.
    """
    tuned = with_values(seen_through(tuned))
    chosen = switching.chosen_for_a_while(tuned, adapters)
    with chosen, making("merge", progress, 2 if requantize is None else 4):
        if requantize is None:
            return undo.merged(tuned)
        model, costs = requantise.merged_and_requantised(tuned, requantize)
    requantise.warn_of_costs(costs)
    return model


def remove(tuned: nn.Module) -> nn.Module:
    """Return the base model, bit-equal to the one given to `apply`; the adapted model stays unchanged."""
    return undo.removed(seen_through(tuned))


def export(
    tuned: nn.Module,
    path: str | os.PathLike[str],
    target: str,
    example_inputs: object = None,
    verify: bool = False,
    *,
    adapter: str | None = None,
    progress: ShowProgress = None,
    **options: Any,
) -> exporters.Exported:
    """Write the adapted model in the format of another program, whole or not at all; the model stays unchanged.

    What the format cannot hold exactly is refused, with the nearest exact way; what it holds in another, equal form is
    written so.  The page "Export" of the documentation has the table of both.

    Args:
        tuned: an adapted model.
        path: what to write: a file or a directory, as the target has it.
        target: `merged`, `peft`, `onnx`, `gguf`, `diffusers`, `kohya`, `mlx`…; `lora_fx.exporters.targets()` has all.
        example_inputs: as for `plan`, of which the first counts; needed by `verify`, and by targets that run the model.
        verify: whether to load what was written in the target's own client, in a subprocess, and to compare the outputs
            there with ours.
        adapter: name of the only one to write; None writes all, of several at one weight where the target can; `merged`
            folds what is in use.
        progress: as for `plan`.
        **options: of the target.

    Raises:
        ExportError: names every site that cannot be expressed, what is not installed, or the difference that verifying
            has found; nothing is written then.
    """
    tuned = exporters.readable(seen_through(tuned))
    tuned = tuned if adapter is None else only(tuned, adapter)
    given = samples_for(tuned, example_inputs).items
    with making("export", progress, 10 if verify else 6):
        return exporters.export(tuned, Path(path), target, given[0] if given else None, verify, **options)


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    out_dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    adapter: str | None = None,
    covariances: str | os.PathLike[str] | None = None,
    progress: ShowProgress = None,
) -> MergeReport:
    """Write a checkpoint with adapters folded in and return what was done to each tensor; no model is made.

    W' = W + Σ scaling · B A over the adapters, accumulated in float32 and rounded once (DoRA: m · V / ‖V‖).  Base and
    adapters stay unchanged; all other tensors are copied byte by byte, and so are tokenizer and configuration.  Memory
    does not grow with the model.  A killed run is continued by the same call; until its end there is no `config.json`.

    Args:
        base_dir: a directory with `model.safetensors`, or with shards and their index.
        adapter_dir: an adapter that `lora_fx.save` or PEFT wrote, or several of them.
        out_dir: a directory that is not there, is empty, or holds the same merge unfinished.
        out_dtype: of all floating point tensors; None keeps each one's own.
        rounding: "nearest", or "stochastic", whose mean is the exact value.
        seed: of the stochastic rounding; the same seed gives the same bytes.
        adapter: of each directory the one of this name; needed where it has several for one weight.
        covariances: of `input_covariances`: codes (compressed-tensors' integers) are chosen by it; None: the nearest.
        progress: as for `plan`; a function is called with (bytes written, bytes in all, name of the tensor).

    Raises:
        AdapterFileError: missing or damaged adapter files.
        AdapterMismatchError: names or shapes that the checkpoint has not, or another base; all of them.
        MergeError: other quantised bases, expert banks, ambiguous names, a directory that is not ours, a full disk,
            values that would not be finite.
    """
    options = streaming.MergeOptions(out_dtype, rounding, seed, covariances)
    with counting("merge", progress) as written:
        return streaming.merge_files(base_dir, adapter_dir, out_dir, options, written, adapter)


def extract(
    tuned_full: nn.Module, base: nn.Module, r: int = 8, rules: Rules | None = None, *, progress: ShowProgress = None
) -> nn.Module:
    """Return an adapted twin of the base that is as near to the tuned model as its rank allows; both stay unchanged.

    At each linear whose weight differs, B A is the truncated singular value decomposition of W_tuned - W_base, the
    nearest matrix of rank r (Eckart and Young 1936), with √σ in A and in B, computed in float32 (float64 for float64).
    The scaling is 1 (alpha = r).  The twin is as `apply` returns it: it can be saved, trained, merged.  What differs
    outside of linears (biases, norms) is lost, and a LoraFxWarning names it; `lora_fx.extracted` reports each site.

    Args:
        tuned_full: the model after full fine-tuning.
        base: the model before.
        r: rank at every site, without `rules`.
        rules: which sites get which rank and scaling; `bias: true` and `train:` take over more of the tuned model.
        progress: as for `plan`.

    Raises:
        RefusedError: two architectures, no difference, values that are not finite, rules with DoRA or slices.
        RuleError, NoMatchError: as `plan`.
    """
    with making("extract", progress, 5):
        twin, report = extraction.extracted(tuned_full, base, r, rules)
    extraction.warn_of_losses(report)
    return take_over(twin)
