"""A GraphDiff as text: like `diff -u`, grouped by site, the same change of repeated blocks shown once."""

from __future__ import annotations

from lora_fx.graphdiff.compare import GraphDiff
from lora_fx.plantext import fold_rows
from lora_fx.text import count, thousands


def diff_text(diff: GraphDiff, fold: bool = True) -> str:
    """Return the diff as text; an empty diff is one line that says so."""
    if not diff.changes:
        return f"no difference: {diff.a} and {diff.b}, {count(diff.unchanged, 'statement')}"
    groups: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for change in diff.changes:
        key = (change.note, change.removed, change.added)
        groups.setdefault(key if fold else (change.path, *key[1:]), []).append(change.path)
    lines = [f"--- {diff.a}", f"+++ {diff.b}"]
    for (note, removed, added), paths in groups.items():
        lines += _hunk(paths, note, removed, added)
    return "\n".join([*lines, _sums(diff)])


def _hunk(paths: list[str], note: str, removed: tuple[str, ...], added: tuple[str, ...]) -> list[str]:
    names = ", ".join(" ".join(row[0].split()) for row in fold_rows([(path,) for path in paths]))
    head = f"@@ {names} · {note} @@" if note else f"@@ {names} @@"
    return [head, *(f"-    {text}" for text in removed), *(f"+    {text}" for text in added)]


def _sums(diff: GraphDiff) -> str:
    before, after = diff.parameters
    change = f"{'+' if after >= before else '-'}{thousands(abs(after - before))}"
    sites = count(len(diff.changes), "site")
    return f"{sites} changed, {count(diff.unchanged, 'statement')} unchanged, {change} parameters"
