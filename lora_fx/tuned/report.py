"""What an adapted model is made of, read off the model itself; so it also works after torch.load."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import fx, nn

from lora_fx.adapters.attach import STATE, Attached, all_attached
from lora_fx.adapters.placed import placed_in
from lora_fx.adapters.trained import added_rows
from lora_fx.liveness.heads import late_modules
from lora_fx.models.between import one_at_a_time
from lora_fx.models.packed import values_of_codes
from lora_fx.models.wrappers import seen_through
from lora_fx.models.zero import numbers_in
from lora_fx.passes.pack import NOTHING_MIXED
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.planning.rows import fold_rows
from lora_fx.regions.install import in_graphs, regions
from lora_fx.regions.prefix.blocks import kept_blocks
from lora_fx.regions.prefix.state import Kept
from lora_fx.regions.program import LOSS
from lora_fx.regions.region import Region
from lora_fx.text import columns, count, json_text, share_of_parameters
from lora_fx.tuned.build import record_in, trainable
from lora_fx.tuned.heads import late_refusals


@dataclass(frozen=True, slots=True)
class AdaptedSite:
    """One adapter as it sits in the model."""

    path: str
    op: str
    adapter: str
    rule: str
    r: int
    scaling: float
    parameters: int
    backend: str
    """"graph" if a region's graph or the GraphModule's own computes it, else "module"."""
    call: int | None = None
    """The call that it serves, where each has an adapter of its own."""
    weight: float = 1.0
    """How much of ΔW this thread uses; 0 for none."""


@dataclass(frozen=True, slots=True)
class RegionReport:
    """One region: how many graphs fit it, how often, and why calls missed them."""

    path: str
    graphs: int
    hits: int
    misses: dict[str, int]
    seconds: float
    failures: tuple[str, ...]
    guards: tuple[str, ...]
    """What the guards of its graphs check, in the order of checking."""
    optimised: tuple[str, ...] = ()
    """What made its graphs cheaper to train and was compared with the forward: "stack", "compile", "liveness", …;
    with "labels" its rows are computed for those who ask."""
    given_up: tuple[str, ...] = ()
    """Why it was not done to a graph after all."""


@dataclass(frozen=True, slots=True)
class LateReport:
    """One module that computes its output when it is asked for, or why a model that was to has none."""

    path: str
    optimisation: str
    calls: int
    """How often its output was left for later."""
    otherwise: dict[str, int]
    """How often it was not, by reason."""
    refused: str = ""
    """Why it never is; of the whole model where the path is empty."""


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """What is kept of the output of frozen blocks, and how often it was of use (`cached_prefix`)."""

    blocks: tuple[str, ...]
    hits: int
    """Rows (sequences, images) of batches that were not computed."""
    misses: int
    """Rows that were computed, to be kept."""
    kept: int
    """How many outputs are in memory: of rows, or of whole calls where rows are not kept apart."""
    bytes: int
    left_out: int
    """How many found no room."""
    whole_calls: int
    """Of the misses, those that can only be of use if the whole call comes again: their rows are not kept apart."""
    asked: int
    """How often something between two blocks was computed only because somebody asked for it."""
    otherwise: dict[str, int]
    """How often a block was computed as if nothing were kept, by reason."""

    def __str__(self) -> str:
        others = ", ".join(f"{number} × {reason}" for reason, number in self.otherwise.items())
        row = (
            " ".join(name for name, *_ in fold_rows([(path,) for path in self.blocks])),
            f"kept: {count(self.kept, 'output')}, {self.bytes:,} B",
            f"rows: {count(self.hits, 'hit')}, {self.misses} computed",
            f"{self.left_out} found no room" if self.left_out else "",
            f"others: {others}" if others else "",
        )
        return columns([tuple(filter(None, row))])


@dataclass(frozen=True, slots=True, repr=False)
class Report(InNotebook):
    """What `inspect` returns."""

    model: str
    sites: tuple[AdaptedSite, ...]
    regions: tuple[RegionReport, ...]
    trained: tuple[str, ...]
    trainable: int
    total: int
    """Number of parameters of the adapted model, adapters included."""
    late: tuple[LateReport, ...] = ()
    """What is computed only when it is asked for: of the optimisations "loss" and "liveness"."""
    prefix: PrefixReport | None = None
    """What is kept of frozen blocks, inside of `cached_prefix`."""

    def __str__(self) -> str:
        several = len({site.adapter for site in self.sites}) > 1
        rows = [_site_row(site, several) for site in self.sites]
        lines = [f"{self.model} · {count(len(self.sites), 'adapted site')}", "", columns(fold_rows(rows))]
        if self.regions:
            lines += ["", columns(fold_rows([_region_row(region) for region in self.regions]))]
        if self.late:
            lines += ["", columns([_late_row(late) for late in self.late])]
        if self.prefix:
            lines += ["", str(self.prefix)]
        return "\n".join([*lines, "", f"Trainable: {share_of_parameters(self.trainable, self.total)}."])

    def to_json(self) -> str:
        return json_text({"schema_version": 1, **asdict(self)}, indent=1)


def print_trainable(tuned: nn.Module) -> None:
    """Write how many parameters are trained to stdout: `trainable: 8,192 of 228,416 parameters (3.6 %)`."""
    told = report(seen_through(tuned))
    print(f"trainable: {share_of_parameters(told.trainable, told.total)}")


def _site_row(site: AdaptedSite, several: bool) -> tuple[str, ...]:
    own = f"{count(site.parameters, 'parameter')} per site"
    used = "" if site.weight == 1 else " (off)" if not site.weight else f" weight={site.weight:g}"
    names = (f"{site.adapter}{used}",) if several or used else ()
    return (site.path, f"r={site.r} scaling={site.scaling:g}", *names, site.backend, site.rule, own)


def _region_row(region: RegionReport) -> tuple[str, ...]:
    misses = ", ".join(f"{number} × {reason}" for reason, number in region.misses.items())
    graphs = count(region.graphs, "graph") if region.graphs else f"no graph: {'; '.join(region.failures)}"
    hits = count(region.hits, "hit")
    learnt = f"{count(len(region.guards), 'guard')}, {region.seconds:.1f} s"
    done = "; ".join(filter(None, (", ".join(region.optimised), *(f"not optimised: {why}" for why in region.given_up))))
    return (region.path or "(root)", graphs, learnt, hits, f"misses: {misses}" if misses else "no misses", done)


def _late_row(late: LateReport) -> tuple[str, ...]:
    if late.refused:
        return (late.path or "(root)", f"no {late.optimisation}: {late.refused}", "", "")
    others = ", ".join(f"{number} × {reason}" for reason, number in late.otherwise.items())
    done = f"{count(late.calls, 'call')} left for later"
    return (late.path, late.optimisation, done, f"others: {others}" if others else "")


def _late(tuned: nn.Module) -> tuple[LateReport, ...]:
    there = [LateReport(s.path, s.what, s.calls, dict(s.otherwise)) for _, s in late_modules(tuned)]
    refused = [LateReport(path, LOSS, 0, {}, reason) for path, reason in late_refusals(tuned).items()]
    return (*there, *refused)


@one_at_a_time
def report(tuned: nn.Module) -> Report:
    """Return the report of an adapted model; RefusedError if it is not adapted."""
    record, places = record_in(tuned), placed_in(tuned)
    whole = [path for place in places for path in place.trained()]
    whole += [bias.path for place in places for bias in place.record.plan.biases]
    whole += dict.fromkeys(f"{name}, {count(len(rows.ids), 'row')}" for name, _, rows in added_rows(tuned))
    covered = in_graphs(tuned)
    sites = tuple(_site(tuned, path, adapter, covered) for path, adapter in all_attached(tuned))
    ran = tuple(_region(region) for _, _, region in regions(tuned))
    coded = values_of_codes(tuned)
    total = sum(coded.get(id(parameter)) or numbers_in(parameter) for parameter in tuned.parameters())
    trained = sum(numbers_in(p) for p in trainable(tuned) if p.requires_grad)
    return Report(record.plan.model, sites, ran, tuple(whole), trained, total, _late(tuned), prefix_report(tuned))


def prefix_report(tuned: nn.Module) -> PrefixReport | None:
    """Return what is kept of the frozen blocks of a model; None if nothing is to be."""
    blocks = [(path, state.kept) for path, _, state in kept_blocks(tuned) if state.kept is not None]
    return report_of(blocks[0][1], [path for path, _ in blocks]) if blocks else None


def report_of(kept: Kept, paths: Sequence[str]) -> PrefixReport:
    """Return the report of what is kept of the blocks at some paths."""
    return PrefixReport(
        blocks=tuple(paths),
        hits=kept.hits,
        misses=kept.misses,
        kept=len(kept.entries),
        bytes=kept.entries.bytes,
        left_out=kept.entries.left_out,
        whole_calls=kept.by_calls,
        asked=kept.asked,
        otherwise=dict(kept.bypassed),
    )


def _site(tuned: nn.Module, path: str, attached: Attached, covered: set[str]) -> AdaptedSite:
    in_own_graph = isinstance(tuned, fx.GraphModule) and STATE not in attached.owner.__dict__
    return AdaptedSite(
        path=path,
        op=attached.spec.site.op,
        adapter=attached.spec.adapter,
        rule=attached.spec.rule,
        r=attached.spec.lora.r,
        call=attached.call,
        scaling=attached.spec.scaling,
        parameters=sum(map(numbers_in, attached.parameters())),
        backend="graph" if in_own_graph or path in covered else "module",
        weight=attached.spec.record.switch.now().share(attached.spec.adapter),
    )


def _region(region: Region) -> RegionReport:
    programs = region.block.programs
    return RegionReport(
        path=region.path,
        graphs=len(programs),
        hits=region.hits,
        misses=dict(region.misses),
        seconds=region.block.seconds,
        failures=tuple(dict.fromkeys(region.block.failures.values())),
        guards=tuple(dict.fromkeys(reason for program in programs for reason in program.guard.reasons)),
        optimised=tuple(dict.fromkeys((*(name for p in programs for name in p.optimised), *_labels(region)))),
        given_up=tuple(dict.fromkeys((*(why for p in programs for why in p.given_up), *_left_out(region)))),
    )


def _labels(region: Region) -> Iterator[str]:
    """Yield that a region computes rows where they are asked for, if it does."""
    if region.deferring.last and any(program.labelled_proven for program in region.block.programs):
        yield "labels"


def _left_out(region: Region) -> Iterator[str]:
    """Yield why a region computes rows of padding, or rows that nobody asks for, where it was asked not to."""
    programs = region.block.programs
    if region.deferring.last and region.deferring.tally.stopped:
        yield "labels: all rows are asked for"
    for low in dict.fromkeys(p.packed.soft for p in programs if p.packed is not None and p.packed.soft is not None):
        yield f"liveness: its mask is {low:.3g} at its least, and weights are sure to be 0 under -inf or finfo.min only"
    mixing = (p.why_not_labelled for p in programs if p.why_not_labelled and p.why_not_packed != NOTHING_MIXED)
    yield from (f"labels: {reason}" for reason in dict.fromkeys((*region.deferring.otherwise, *mixing)))
    if region.tally.stopped:
        yield f"liveness: {region.tally.why}"
    elif not any(program.packed for program in programs):
        reasons = dict.fromkeys(program.why_not_packed for program in programs if program.why_not_packed)
        yield from (f"liveness: {reason}" for reason in reasons if reason != NOTHING_MIXED)
