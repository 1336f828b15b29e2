"""A plan as one HTML page that needs nothing else and can be read without scripts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_fx.planning.decisions import Decisions
from lora_fx.planning.planned import Decision, PlannedRegion, PlannedSite, TrainedModule, train_reason
from lora_fx.planning.render.page import KEYS, Entries, entry, escape, page
from lora_fx.planning.rows import fold_groups, region_lines, row_of, training_lines
from lora_fx.text import count, listing, percent, share_of_parameters, thousands, visible

_MOST_BARS = 24
_LEGEND = f"{KEYS}  Signs: × that many sites alike, or calls; + is trained."
_STYLE = """
summary b{font-family:inherit}
.plan,.bars{width:100%}.plan td,.plan th,.bars td,.bars th{font-size:13px;vertical-align:top}
header th[scope=row]{font-weight:400}
:is(.plan,.bars) th[scope=row]{font-family:ui-monospace,monospace;font-weight:400;overflow-wrap:anywhere}
.plan tr>:nth-child(6){text-align:right;font-variant-numeric:tabular-nums}
.plan th[scope=row]{width:38%}.bars th[scope=row]{width:50%}tr+tr th{border-top:1px solid var(--line)}
.bars .bar{width:34%}.bar span{display:block;height:14px;min-width:2px;background:var(--added);border-radius:2px}
.adapt details,.train details{border-left:4px solid var(--added)}.refuse details{border-left:4px solid var(--removed)}
section li{margin:4px 0;overflow-wrap:anywhere}
@media(max-width:640px){.plan,.bars{display:block}.plan tbody,.bars tbody{display:block}.plan .heads{display:none}
.plan tr,.bars tr{display:flex;flex-wrap:wrap;padding:6px 0;border-top:1px solid var(--line)}
.plan td,.bars td,.plan th,.bars th{padding:0 0 0 12px;border:0}.plan td:empty{display:none}
.plan th[scope=row],.bars th[scope=row]{flex:1 0 100%}.bars .bar{flex:1;width:auto;padding-right:12px}
.plan td:nth-child(6)::after{content:" trained"}}
"""
_HEADS = ("site", "weight", "calls", "what is done", "backend", "trained")


def decisions_html(plan: Decisions, regions: Sequence[PlannedRegion], fold: bool = True) -> str:
    """Return the plan as a page: sums, parameters by site, sites by what is done and why; repeated ones once if `fold`.

    Where there is no room for all, sites that stay as they are are left out first.
    """
    sections = _Sections(plan, regions, Entries(), fold)
    refused = sections.of("Refused", "refuse")
    notes = sections.notes()
    trained = sections.of("Trained whole", "train")
    adapted = sections.of("Adapted", "adapt")
    alone = sections.of("Left alone", "skip", "keep")
    main = _bars(plan) + adapted + trained + refused + alone + notes + sections.entries.told()
    return page(f"{plan.model} · {plan.source}", _sums(plan), main, _STYLE, sections.entries.paths, _LEGEND)


# -- the head of a plan's page


def _sums(plan: Decisions) -> str:
    by_adapters = sum(site.trainable for site in plan.adapted)
    whole = sum(module.parameters for module in plan.train)
    decided = [site.decision for site in plan.sites]
    in_graphs = sum(site.backend == "graph" for site in plan.adapted)
    alone = decided.count("keep") + decided.count("skip")
    rows = [
        ("adapted", f"{count(len(plan.adapted), 'site')}, {thousands(in_graphs)} in graphs", by_adapters),
        ("trained whole", count(len(plan.train), "module"), whole),
        *_rows_and_biases(plan),
        ("left alone", count(alone, "site"), 0),
        ("refused", count(decided.count("refuse"), "site"), 0),
    ]
    lines = "".join(
        f'<tr><th scope="row">{what}</th><td>{number}</td><td class="n">{thousands(trained)}</td></tr>'
        for what, number, trained in rows
    )
    head = '<tr><td></td><th scope="col">where</th><th class="n" scope="col">trainable parameters</th></tr>'
    sums = f"Trainable: {share_of_parameters(plan.trainable, plan.total)}."
    return f'<p class="sums">{sums}</p><table>{head}{lines}</table>'


def _rows_and_biases(plan: Decisions) -> Iterator[tuple[str, str, int]]:
    """Yield what is trained of embeddings and of other biases, if anything is."""
    if plan.tokens:
        rows = sum(len(rows.ids) for rows in plan.tokens if not rows.tied_to)
        yield "trained rows", count(rows, "row"), sum(rows.parameters for rows in plan.tokens)
    if plan.biases:
        yield "trained biases", count(len(plan.biases), "vector"), sum(bias.parameters for bias in plan.biases)


def _bars(plan: Decisions) -> str:
    """Return a bar for each kind of site that is trained, the largest first; after the first ones their sum."""
    trained = {site.path: site.trainable for site in plan.adapted}
    trained |= plan.beside
    groups = fold_groups([(path,) for path in trained])
    bars = [(row[0], sum(trained[path] for path in paths)) for row, paths in groups]
    bars.sort(key=lambda bar: -bar[1])
    rest = bars[_MOST_BARS:]
    shown = bars[:_MOST_BARS] + ([(f"{len(rest):,} more", sum(number for _, number in rest))] if rest else [])
    most = max((number for _, number in shown), default=0)
    if not most:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="n">{thousands(number)}</td>'
        f'<td class="n">{percent(number, plan.trainable)}</td>'
        f'<td class="bar"><span style="width:{100 * number / most:.3g}%"></span></td></tr>'
        for name, number in shown
    )
    label = "trainable parameters of each kind of site, the most first, and their share of all that is trained"
    return f'<section><h2>Trainable parameters</h2><table class="bars" aria-label="{label}">{rows}</table></section>'


# -- sections


@dataclass(slots=True)
class _Sections:
    """The parts of a plan's page, which share its room: those asked for first get it."""

    plan: Decisions
    regions: Sequence[PlannedRegion]
    entries: Entries
    fold: bool

    def of(self, title: str, *decisions: Decision) -> str:
        """Return the sites with one of the decisions, those with the same reason together."""
        groups: dict[tuple[Decision, str], list[PlannedSite]] = {}
        for decision in decisions:
            if decision == "train":
                groups |= {(decision, train_reason(module.pattern)): [] for module in self.plan.train}
            for site in self.plan.sites:
                if site.decision == decision:
                    groups.setdefault((decision, site.reason), []).append(site)
        body = "".join(self._group(decision, reason, sites) for (decision, reason), sites in groups.items())
        return f'<section class="{decisions[0]}"><h2>{title}</h2>{body}</section>' if body else ""

    def _group(self, decision: Decision, reason: str, sites: Sequence[PlannedSite]) -> str:
        """Return all that has one reason under it; nothing where there is no room for any."""
        modules = [part for part in self.plan.train if decision == "train" and train_reason(part.pattern) == reason]
        lines = "".join([*self._modules(modules), *self._sites(sites, decision == "adapt")])
        if not lines:
            return ""
        rules = listing((f"rule {rule}" for rule in dict.fromkeys(site.rule for site in sites) if rule), 3)
        parameters = sum(site.trainable for site in sites) + sum(module.parameters for module in modules)
        facts = (
            count(len(modules), "module") if modules else "",
            count(len(sites), "site") if sites else "",
            {"refuse": f"asked for by {rules}", "skip": f"skipped by {rules}"}.get(decision, ""),
            f"{count(parameters, 'parameter')} to train" if parameters else "",
        )
        heads = "".join(f'<th scope="col">{head}</th>' for head in (_HEADS if decision == "adapt" else _HEADS[:3]))
        body = f'<table class="plan"><tr class="heads">{heads}</tr>{lines}</table>'
        self.entries.size += len(body.encode()) - len(lines.encode()) + len(reason.encode())
        return entry(reason, body, " · ".join(filter(None, facts)), opened=decision != "keep")

    def _sites(self, sites: Sequence[PlannedSite], adapted: bool) -> Iterator[str]:
        known = {site.path: site for site in sites}
        for (name, *cells), paths in self._folded([(site.path, *row_of(site)[1:5]) for site in sites]):
            behind = [known[path] for path in paths]
            cells = [*cells, thousands(sum(site.trainable for site in behind))] if adapted else cells[:2]
            yield self.entries.add(_row(name, cells), [visible(path) for site in behind for path in site.site.paths])

    def _modules(self, modules: Sequence[TrainedModule]) -> Iterator[str]:
        rows = [(module.path, f"the whole module, {count(module.parameters, 'parameter')}") for module in modules]
        for (name, *cells), paths in self._folded(rows):
            yield self.entries.add(_row(name, [*cells, ""]), list(map(visible, paths)))

    def _folded(self, rows: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[str]]]:
        """Return (row, paths that it stands for)."""
        return fold_groups(rows) if self.fold else [(row, [row[0]]) for row in rows]

    def notes(self) -> str:
        """Return what has to be known besides."""
        plan = self.plan
        lines = [*region_lines(self.regions), *training_lines(plan.sites, self.regions), *plan.notes]
        items = "".join(self.entries.add(f"<li>{escape(line.strip())}</li>", []) for line in lines)
        return f"<section><h2>Notes</h2><ul>{items}</ul></section>" if items else ""


def _row(name: str, cells: Sequence[str]) -> str:
    texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{texts}</tr>'
