"""A Plan, or the difference of two, as one HTML page that needs nothing else.  No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lora_fx.planning.diff import PlanDiff
from lora_fx.planning.plan import Plan
from lora_fx.planning.rows import rows_of

_HEADS = ("site", "weight", "calls", "what is done", "backend", "why")
_KINDS = {"+": "added", "!": "refused", "·": "kept", "-": "removed"}
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --added: #1b6e1b; --removed: #b00020; --kept: #666; }
@media (prefers-color-scheme: dark) { :root { --added: #7bd88f; --removed: #ff8a8a; --kept: #aaa; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); }
td { font-family: ui-monospace, monospace; font-size: 13px; white-space: nowrap; }
td:last-child { white-space: normal; }
.added { color: var(--added); } .removed, .refused { color: var(--removed); } .kept { color: var(--kept); }
body:has(#only:checked) tr.kept { display: none; }
"""


def plan_html(plan: Plan, fold: bool = True) -> str:
    """Return the plan as a page: a table with a line for each site, the notes, the sums."""
    rows = [(_KINDS[row[3][0]], row) for row in rows_of(plan.sites, fold)]
    notes = [f"train whole: {each.path}" for each in plan.train] + [f"note: {each}" for each in plan.notes]
    only = '<p><label><input type="checkbox" id="only"> only what is adapted or refused</label></p>'
    return _page(plan.header, only + _table(_HEADS, rows), [*notes, plan.sums])


def plan_diff_html(diff: PlanDiff) -> str:
    """Return the difference of two plans as a page."""
    rows = [
        (_KINDS[sign], (sign, path, state))
        for path, *states in diff.folded()
        for sign, state in zip("-+", states, strict=True)
        if state
    ]
    body = _table(("", "site", "what is done"), rows) if rows else "<p>no difference</p>"
    return _page(f"{diff.a} → {diff.b}", body, [diff.stat()])


def _table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    lines = [f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>' for kind, row in rows]
    return f'<div class="wide" tabindex="0">\n<table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table>\n</div>"


def _page(title: str, body: str, notes: Iterable[str]) -> str:
    below = "\n".join(f"<p>{escape(each)}</p>" for each in notes)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n{below}\n"
        f"</main>\n</body>\n</html>"
    )
