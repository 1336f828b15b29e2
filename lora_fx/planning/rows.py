"""What a Plan shows of its sites and regions, as rows and lines; repeated blocks are folded into one."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lora_fx.planning.planned import PlannedRegion, PlannedSite
from lora_fx.rules.inits import FRESH
from lora_fx.rules.ruleset import LoRAConfig
from lora_fx.text import columns, listing, visible

_PASSES = {"fuse": "fused", "stack": "stacked with siblings", "recompute": "with inputs made again instead of kept"}
LOSS_IF = "loss (where nothing else is seen to read its output)"
SYMBOLS = {"adapt": "+", "train": "+", "keep": "·", "skip": "·", "refuse": "!"}
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
"""A number among the names of a path, such as that of a layer."""


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


def row_of(planned: PlannedSite) -> tuple[str, ...]:
    """Return (path, weight, calls, what is done, backend, why) of a site."""
    doing = SYMBOLS[planned.decision]
    if planned.lora is not None:
        doing += f" {_lora_text(planned.lora)}"
        doing += "" if planned.slices is None else f" on {', '.join(planned.slices.adapt)}"
        doing += f" for each of {planned.calls} calls" if planned.per_call else ""
    elif planned.decision != "keep":
        doing += {"train": " trained whole", "skip": " skipped", "refuse": " refused"}[planned.decision]
    backend = planned.backend if planned.decision == "adapt" else ""
    calls = f"×{planned.calls}" if planned.calls is not None and planned.calls != 1 else ""
    return tuple(map(visible, (planned.path, planned.site.text(), calls, doing, backend, planned.reason)))


def _lora_text(lora: LoRAConfig) -> str:
    dropout = f" dropout={lora.dropout:g}{' shared' * lora.share_dropout}" if lora.dropout else ""
    switches = (("rslora", lora.rslora), ("dora", lora.dora), ("lora_fa", lora.lora_fa), ("bias", lora.bias))
    init = f" init={lora.init}" if lora.init not in FRESH else ""
    init += f" one {lora.share} for all" if lora.share != "none" else ""
    invoked = f" from {listing(map(str, lora.invocation))} on" if lora.invocation else ""
    named = "".join(f" {name}" for name, on in switches if on)
    return f"r={lora.r} alpha={lora.alpha:g}{dropout}{init}{named}{invoked}"


def fold_rows(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the rows with those that differ only in one number of the path as one, `h.{0..11}.attn`, made visible."""
    return [row for row, _ in fold_groups(rows)]


def fold_groups(rows: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Return (row, paths) as `fold_rows` folds them: each row with the paths, as given, that it stands for."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, *rest in rows:
        groups.setdefault((NUMBER.sub("#", path), *rest), []).append(path)
    folded: list[tuple[tuple[str, ...], list[str]]] = []
    for (template, *rest), paths in groups.items():
        one = _ranged(template, paths)
        parts = [(one, paths)] if one else [(path, [path]) for path in paths]
        folded += [(tuple(map(visible, (name, *rest))), behind) for name, behind in parts]
    return folded


def _ranged(template: str, paths: Sequence[str]) -> str:
    """Return `h.{0..11}.attn  ×12`; "" where the paths are not exactly the product of the ranges of their numbers."""
    columns_of_numbers = zip(*map(NUMBER.findall, paths), strict=True)
    numbers = [set(map(int, column)) for column in columns_of_numbers]
    full = math.prod(map(len, numbers)) == len(paths) > 1
    if not full or any(max(values) - min(values) + 1 != len(values) for values in numbers):
        return ""
    for values in numbers:
        low, high = min(values), max(values)
        template = template.replace("#", str(low) if low == high else f"{{{low}..{high}}}", 1)
    return f"{template}  ×{len(paths)}"


def region_lines(regions: Sequence[PlannedRegion]) -> list[str]:
    """Return a line for each reason for which regions are not graphs."""
    failed = [region for region in regions if region.backend == "module"]
    return _lines_by_reason("not a graph", [(region.path or "(root)", region.reason) for region in failed])


def training_lines(sites: Sequence[PlannedSite], regions: Sequence[PlannedRegion]) -> list[str]:
    """Return how many adapted sites are cheaper to train, and why some are not; and what is done by its name only."""
    adapted = [site for site in sites if site.decision == "adapt"]
    counts = Counter(name for site in adapted for name in site.passes)
    cheaper = [f"{counts[name]} {text}" for name, text in _PASSES.items() if counts[name]]
    lines = [f"  in training: {', '.join(cheaper)}"] if cheaper else []
    lines += _lines_by_reason("not fused", [(site.path, site.not_fused) for site in adapted if site.not_fused])
    named = [(region.path or "(root)", told_passes({p.name: p.reason for p in region.by_name})) for region in regions]
    named += [(site.path, LOSS_IF) for site in sites if "loss" in site.passes]
    return lines + _lines_by_reason("by name", [(path, told) for path, told in named if told])


def told_passes(reasons: Mapping[str, str]) -> str:
    """Return what is done, then what is not and why: from optimisations with why not, or nothing."""
    parts = [", ".join(name for name, why in reasons.items() if not why)]
    parts += [f"no {name} ({why})" for name, why in reasons.items() if why]
    return "; ".join(filter(None, parts))


def _lines_by_reason(what: str, reasons: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each reason, with all paths that have it, from (path, reason)."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for path, reason in reasons:
        groups.setdefault(reason, []).append((path,))
    return [f"  {what}: {', '.join(name for name, *_ in fold_rows(rows))}: {why}" for why, rows in groups.items()]
