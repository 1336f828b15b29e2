"""A GraphDiff as text: like `diff -u`, grouped by site, the same change of repeated blocks shown once."""

from __future__ import annotations

import re

from lora_fx.graphdiff.compare import GraphDiff, SiteChange
from lora_fx.plantext import fold_rows
from lora_fx.text import count, thousands


def diff_text(diff: GraphDiff, fold: bool = True) -> str:
    """Return the diff as text; an empty diff is one line that says so."""
    if not diff.changes:
        return f"no difference: {diff.a} and {diff.b}, {count(diff.unchanged, 'statement')}"
    groups: dict[object, list[SiteChange]] = {}
    for change in diff.changes:
        key = (change.note, *map(_without_numbers, (change.removed, change.added))) if fold else change.path
        groups.setdefault(key, []).append(change)
    lines = [f"--- {diff.a}", f"+++ {diff.b}"]
    for changes in groups.values():
        lines += _hunk([change.path for change in changes], changes[0])
    return "\n".join([*lines, _sums(diff)])


def _without_numbers(statements: tuple[str, ...]) -> str:
    """Return the statements as one text without the numbers of blocks and of repeated names."""
    return _BLOCK_NUMBER.sub("#", "\n".join(statements))


_BLOCK_NUMBER = re.compile(r"(?<=\w\.)\d+(?=\.)|(?<=_)\d+\b")


def _hunk(paths: list[str], change: SiteChange) -> list[str]:
    names = ", ".join(" ".join(row[0].split()) for row in fold_rows([(path,) for path in paths]))
    head = f"@@ {names} · {change.note} @@" if change.note else f"@@ {names} @@"
    return [head, *(f"-    {text}" for text in change.removed), *(f"+    {text}" for text in change.added)]


def _sums(diff: GraphDiff) -> str:
    before, after = diff.parameters
    change = f"{'+' if after >= before else '-'}{thousands(abs(after - before))}"
    sites = count(len(diff.changes), "site")
    return f"{sites} changed, {count(diff.unchanged, 'statement')} unchanged, {change} parameters"
