"""A Plan as text for people; repeated blocks are folded into one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_fx.planning.decide import Plan, PlannedSite, not_fused
from lora_fx.rules.ruleset import LoRAConfig
from lora_fx.text import columns, count, thousands, wrapped

_PASSES = {"fuse": "fused", "stack": "stacked with siblings", "recompute": "with inputs made again instead of kept"}
SYMBOLS = {"adapt": "+", "keep": "·", "skip": "·", "refuse": "!"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def plan_text(plan: Plan, fold: bool = True, width: int | None = None) -> str:
    """Return the header, a line for each site (identical sites of repeated blocks as one), the notes and the sums.

    Where the table is wider than `width`, each site takes two lines; other long lines are broken.
    """
    table = _fitting(rows_of(plan, fold), width)
    modules = [f"  train whole: {each.path}, {count(each.parameters, 'parameter')}" for each in plan.train]
    notes = [f"  note: {note}" for note in plan.notes]
    parts = [header(plan), "", table, *modules, *_region_lines(plan), *_training_lines(plan), *notes, "", sums(plan)]
    return wrapped("\n".join(parts), width)


def plan_stat(plan: Plan) -> str:
    """Return the header, a line for each rule and one for what no rule takes, and the sums."""
    groups: dict[tuple[str, str], list[PlannedSite]] = {}
    for each in plan.sites:
        groups.setdefault((each.decision, each.rule or each.reason), []).append(each)
    rows = [_stat_row(decision, rule, sites) for (decision, rule), sites in groups.items()]
    modules = [f"  train whole: {each.path}, {count(each.parameters, 'parameter')}" for each in plan.train]
    return "\n".join([header(plan), "", columns(rows), *modules, "", sums(plan)])


def _stat_row(decision: str, rule: str, sites: Sequence[PlannedSite]) -> tuple[str, ...]:
    does = {"adapt": "adapted", "keep": "kept", "skip": "skipped", "refuse": "refused"}[decision]
    trainable = sum(each.trainable for each in sites)
    return (rule, count(len(sites), "site"), does, count(trainable, "parameter") if trainable else "")


def rows_of(plan: Plan, fold: bool = True) -> list[tuple[str, ...]]:
    """Return (path, weight, calls, what is done, backend, why) for each site, repeated blocks as one if `fold`."""
    rows = [row_of(site) for site in plan.sites]
    return fold_rows(rows) if fold else rows


def _fitting(rows: Sequence[tuple[str, ...]], width: int | None) -> str:
    table = columns(rows)
    if width is None or all(len(line) <= width for line in table.splitlines()):
        return table
    lines = []
    for path, weight, calls, doing, backend, reason in rows:
        first, second = (path, calls), (doing, backend, weight, reason)
        lines += [f"  {'  '.join(filter(None, first))}", f"    {'  '.join(filter(None, second))}"]
    return "\n".join(lines)


def header(plan: Plan) -> str:
    """Return `GPT · qkvo · 48 of 48 adapted sites in graphs`."""
    in_graph = sum(site.backend == "graph" for site in plan.adapted)
    how = f"{in_graph} of {len(plan.adapted)} adapted sites in graphs" if plan.adapted else "nothing adapted"
    return f"{plan.model} · {plan.source} · {how}"


def row_of(each: PlannedSite) -> tuple[str, ...]:
    """Return (path, weight, calls, what is done, backend, why) of a site."""
    doing = SYMBOLS[each.decision]
    if each.lora is not None:
        doing += f" {_lora_text(each.lora)}{_parts_text(each)}"
    elif each.decision != "keep":
        doing += {"skip": " skipped", "refuse": " refused"}[each.decision]
    backend = each.backend if each.decision == "adapt" else ""
    calls = f"×{each.calls}" if each.calls is not None and each.calls != 1 else ""
    return (each.path, each.site.text(), calls, doing, backend, each.reason)


def _lora_text(lora: LoRAConfig) -> str:
    dropout = f" dropout={lora.dropout:g}{' shared' * lora.share_dropout}" if lora.dropout else ""
    switches = (("rslora", lora.rslora), ("dora", lora.dora), ("bias", lora.bias))
    return f"r={lora.r} alpha={lora.alpha:g}{dropout}" + "".join(f" {name}" for name, on in switches if on)


def _parts_text(each: PlannedSite) -> str:
    """Return ` on q, v` for slices, ` for each of 12 calls` for calls with an adapter each."""
    parts = "" if each.slices is None else f" on {', '.join(each.slices.adapt)}"
    return parts + (f" for each of {each.calls} calls" if each.per_call else "")


def fold_rows(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the rows with those that differ only in one number of the path as one: `h.{0..11}.attn`."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, *rest in rows:
        groups.setdefault((_NUMBER.sub("#", path), *rest), []).append(path)
    folded: list[tuple[str, ...]] = []
    for (template, *rest), paths in groups.items():
        names = [_ranged(template, paths)] if _foldable(paths) else paths
        folded += [(name, *rest) for name in names]
    return folded


def _foldable(paths: Sequence[str]) -> bool:
    """Whether the paths are exactly the product of the ranges of their numbers."""
    if len(paths) == 1:
        return False
    numbers = [{int(match) for match in column} for column in _number_columns(paths)]
    product = 1
    for values in numbers:
        product *= len(values)
    return product == len(paths) and all(max(v) - min(v) + 1 == len(v) for v in numbers)


def _number_columns(paths: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(_NUMBER.findall(path) for path in paths), strict=True))


def _ranged(template: str, paths: Sequence[str]) -> str:
    for column in _number_columns(paths):
        low, high = min(map(int, column)), max(map(int, column))
        template = template.replace("#", str(low) if low == high else f"{{{low}..{high}}}", 1)
    return f"{template}  ×{len(paths)}"


def _region_lines(plan: Plan) -> list[str]:
    """Return a line for each reason for which regions are not graphs."""
    reasons: dict[str, list[str]] = {}
    for region in plan.regions:
        if region.backend == "module":
            reasons.setdefault(region.reason, []).append(region.path or "(root)")
    return [f"  not a graph: {', '.join(_folded_names(paths))}: {reason}" for reason, paths in reasons.items()]


def _training_lines(plan: Plan) -> list[str]:
    """Return how many sites the passes make cheaper to train, and why some are left alone."""
    adapted, alone = plan.adapted, dict[str, list[str]]()
    for each in adapted:
        reason = not_fused(each)
        if reason:
            alone.setdefault(reason, []).append(each.path)
    counts = {name: sum(name in each.passes for each in adapted) for name in _PASSES}
    told = [f"{number} {text}" for name, text in _PASSES.items() if (number := counts[name])]
    lines = [f"  in training: {', '.join(told)}"] if told else []
    return lines + [f"  not fused: {', '.join(_folded_names(paths))}: {reason}" for reason, paths in alone.items()]


def _folded_names(paths: Sequence[str]) -> list[str]:
    return [row[0] for row in fold_rows([(path,) for path in paths])]


def sums(plan: Plan) -> str:
    """Return how many sites are adapted, kept and refused, and how much is trained."""
    adapt, refuse = len(plan.adapted), len(plan.refused)
    share = 100 * plan.trainable / plan.total if plan.total else 0.0
    return (
        f"{adapt} to adapt, {len(plan.sites) - adapt - refuse} to keep, {refuse} refused.  "
        f"Trainable: {thousands(plan.trainable)} of {thousands(plan.total)} parameters ({share:.2g} %)."
    )
