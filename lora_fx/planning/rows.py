"""What a Plan shows of its sites and regions, as rows and lines; repeated blocks are folded into one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_fx.planning.planned import PlannedRegion, PlannedSite
from lora_fx.rules.ruleset import LoRAConfig
from lora_fx.text import columns

_PASSES = {"fuse": "fused", "stack": "stacked with siblings", "recompute": "with inputs made again instead of kept"}
SYMBOLS = {"adapt": "+", "keep": "·", "skip": "·", "refuse": "!"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def rows_of(sites: Sequence[PlannedSite], fold: bool = True) -> list[tuple[str, ...]]:
    """Return (path, weight, calls, what is done, backend, why) for each site, repeated blocks as one if `fold`."""
    rows = [row_of(site) for site in sites]
    return fold_rows(rows) if fold else rows


def table(rows: Sequence[tuple[str, ...]], width: int | None = None) -> str:
    """Return rows of sites one below the other; in two lines each where they are wider than `width`."""
    wide = columns(rows)
    if width is None or all(len(line) <= width for line in wide.splitlines()):
        return wide
    lines = []
    for path, weight, calls, doing, backend, reason in rows:
        first, second = (path, calls), (doing, backend, weight, reason)
        lines += [f"  {'  '.join(filter(None, first))}", f"    {'  '.join(filter(None, second))}"]
    return "\n".join(lines)


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


def region_lines(regions: Sequence[PlannedRegion]) -> list[str]:
    """Return a line for each reason for which regions are not graphs."""
    reasons: dict[str, list[str]] = {}
    for region in regions:
        if region.backend == "module":
            reasons.setdefault(region.reason, []).append(region.path or "(root)")
    return [f"  not a graph: {', '.join(_folded_names(paths))}: {reason}" for reason, paths in reasons.items()]


def training_lines(adapted: Sequence[PlannedSite]) -> list[str]:
    """Return how many adapted sites the passes make cheaper to train, and why some are left alone."""
    alone: dict[str, list[str]] = {}
    for site in adapted:
        reason = site.not_fused
        if reason:
            alone.setdefault(reason, []).append(site.path)
    counts = {name: sum(name in site.passes for site in adapted) for name in _PASSES}
    cheaper = [f"{number} {text}" for name, text in _PASSES.items() if (number := counts[name])]
    lines = [f"  in training: {', '.join(cheaper)}"] if cheaper else []
    return lines + [f"  not fused: {', '.join(_folded_names(paths))}: {reason}" for reason, paths in alone.items()]


def _folded_names(paths: Sequence[str]) -> list[str]:
    return [row[0] for row in fold_rows([(path,) for path in paths])]
