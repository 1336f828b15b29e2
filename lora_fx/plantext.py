"""A Plan as text for people; repeated blocks are folded into one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_fx.planning import Plan, PlannedSite
from lora_fx.rules import LoRAConfig
from lora_fx.text import columns, count, thousands

SYMBOLS = {"adapt": "+", "keep": "·", "skip": "·", "refuse": "!"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def plan_text(plan: Plan, fold: bool = True) -> str:
    """Return the header, a line for each site (identical sites of repeated blocks as one), the notes and the sums."""
    rows = [_row(site) for site in plan.sites]
    lines = fold_rows(rows) if fold else rows
    modules = [f"  train whole: {each.path}, {count(each.parameters, 'parameter')}" for each in plan.train]
    notes = [f"  note: {note}" for note in plan.notes]
    parts = [_header(plan), "", columns(lines), *modules, *_region_lines(plan), *notes, "", _sums(plan)]
    return "\n".join(parts)


def _header(plan: Plan) -> str:
    in_graph = sum(site.backend == "graph" for site in plan.adapted)
    how = f"{in_graph} of {len(plan.adapted)} adapted sites in graphs" if plan.adapted else "nothing adapted"
    return f"{plan.model} · {plan.source} · {how}"


def _row(each: PlannedSite) -> tuple[str, ...]:
    doing = SYMBOLS[each.decision]
    if each.lora is not None:
        doing += f" {_lora_text(each.lora)}{_parts_text(each)}"
    elif each.decision != "keep":
        doing += {"skip": " skipped", "refuse": " refused"}[each.decision]
    backend = each.backend if each.decision == "adapt" else ""
    calls = f"×{each.calls}" if each.calls is not None and each.calls != 1 else ""
    return (each.path, each.site.text(), calls, doing, backend, each.reason)


def _lora_text(lora: LoRAConfig) -> str:
    dropout = f" dropout={lora.dropout:g}" if lora.dropout else ""
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


def _folded_names(paths: Sequence[str]) -> list[str]:
    return [row[0] for row in fold_rows([(path,) for path in paths])]


def _sums(plan: Plan) -> str:
    adapt, refuse = len(plan.adapted), len(plan.refused)
    share = 100 * plan.trainable / plan.total if plan.total else 0.0
    return (
        f"{adapt} to adapt, {len(plan.sites) - adapt - refuse} to keep, {refuse} refused.  "
        f"Trainable: {thousands(plan.trainable)} of {thousands(plan.total)} parameters ({share:.2g} %)."
    )
