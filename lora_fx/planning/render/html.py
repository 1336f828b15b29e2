"""A Plan, or the difference of two, as one HTML page that needs nothing else, not even scripts."""

from collections.abc import Iterable, Sequence

from lora_fx.planning.diff import PlanDiff
from lora_fx.planning.plan import Plan
from lora_fx.planning.render.page import escape, filled
from lora_fx.planning.rows import rows_of

_HEADS = ("site", "weight", "calls", "what is done", "backend", "why")
_KINDS = {"+": "added", "!": "refused", "·": "kept", "-": "removed"}


def plan_html(plan: Plan, fold: bool = True) -> str:
    """Return the plan as a page: a table with a line for each site, repeated blocks as one if `fold`, notes, sums."""
    rows = [(_KINDS[row[3][0]], row) for row in rows_of(plan.sites, fold)]
    notes = [f"train whole: {module.path}" for module in plan.train] + [f"note: {note}" for note in plan.notes]
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
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = [f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>' for kind, row in rows]
    return f'<div class="wide" tabindex="0">\n<table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table>\n</div>"


def _page(title: str, main: str, notes: Iterable[str]) -> str:
    below = "\n".join(f"<p>{escape(note)}</p>" for note in notes)
    return filled("plan.html", heading=escape(title), main=main, notes=below).removesuffix("\n")
