"""A GraphDiff as text: like `diff -u`, grouped by site, the same change of repeated blocks shown once."""

import re
from collections.abc import Callable, Sequence

from lora_fx.graphdiff.changes import GraphDifference, SiteChange
from lora_fx.planning.rows import fold_rows
from lora_fx.text import count, scaled, thousands, visible


def diff_text(diff: GraphDifference) -> str:
    """Return the diff as text; an empty diff is one line that says so."""
    if not diff.changes:
        return f"no difference: {diff.a} and {diff.b}, {count(diff.unchanged, 'statement')}"
    lines = [f"--- {diff.a}", f"+++ {diff.b}"]
    for changes in groups_of(diff.changes):
        lines += _hunk(changes)
    return "\n".join([*lines, sums_text(diff)])


def groups_of(changes: Sequence[SiteChange]) -> list[list[SiteChange]]:
    """Return the changes with those of repeated blocks together."""
    groups: dict[object, list[SiteChange]] = {}
    for change in changes:
        groups.setdefault(_kind(change), []).append(change)
    return list(groups.values())


def _kind(change: SiteChange) -> tuple[object, ...]:
    """Return what is equal for the same change of repeated blocks."""
    moved = None if change.moved_from is None else _PATH_NUMBER.sub("#", change.moved_from)
    costs = (change.parameters, change.flops, change.bytes)
    lines = tuple(tuple(map(without_numbers, side)) for side in (change.removed, change.added))
    return (change.note, moved, lines, costs)


def without_numbers(line: str) -> str:
    """Return a line without the numbers of blocks and of repeated names."""
    return _BLOCK_NUMBER.sub("", line)


_BLOCK_NUMBER = re.compile(r"(?<=\w\.)\d+(?=\.)|_\d+\b")  # the first of several names has no number
_PATH_NUMBER = re.compile(r"\d+")


def _hunk(changes: Sequence[SiteChange]) -> list[str]:
    change = changes[0]
    facts = " · ".join(filter(None, (sites_text(changes), visible(change.note), cost_text(change, len(changes)))))
    return [f"@@ {facts} @@", *(f"-    {text}" for text in change.removed), *(f"+    {text}" for text in change.added)]


def sites_text(changes: Sequence[SiteChange]) -> str:
    """Return the paths of the sites, ranges as `{0..11}`, with where they were if they have moved."""
    new = folded([change.path or "(root)" for change in changes])
    old = folded([(change.path if change.moved_from is None else change.moved_from) or "(root)" for change in changes])
    return new if new == old else f"{old} → {new}"


def folded(paths: Sequence[str]) -> str:
    """Return `layer.{0..2}.query ×3` for the paths."""
    return ", ".join(" ".join(row[0].split()) for row in fold_rows([(path,) for path in paths]))


def cost_text(change: SiteChange, number: int = 1) -> str:
    """Return `+128 parameters, +512 B, +256 FLOP`, of each of several sites; empty if nothing changes."""
    pairs = ((change.parameters, _parameters), (change.bytes, size_text), (change.flops, _flops))
    parts = [signed(after - before, written) for (before, after), written in pairs if after != before]
    return ("each " if parts and number > 1 else "") + ", ".join(parts)


def sums_text(diff: GraphDifference) -> str:
    """Return the last line: what has changed in all."""
    parts = [f"{count(len(diff.changes), 'site')} changed", f"{count(diff.unchanged, 'statement')} unchanged"]
    parts.append(signed(diff.parameters[1] - diff.parameters[0], _parameters))
    if diff.bytes[0] != diff.bytes[1]:
        parts.append(signed(diff.bytes[1] - diff.bytes[0], size_text))
    if diff.flops[0] != diff.flops[1]:
        parts.append(f"{signed(diff.flops[1] - diff.flops[0], _flops)} per row")
    return ", ".join(parts)


def signed(number: int, written: Callable[[int], str] = thousands) -> str:
    """Return the number with its sign, as `written` writes it."""
    return f"{'-' if number < 0 else '+'}{written(abs(number))}"


def _parameters(number: int) -> str:
    return count(number, "parameter")


def _flops(number: int) -> str:
    return f"{thousands(number)} FLOP"


def size_text(number: int) -> str:
    """Return a number of bytes as `1.5 GB`."""
    return scaled(number, "B")
