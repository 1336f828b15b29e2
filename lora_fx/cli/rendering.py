"""Plans and their differences in each of the formats.  No torch here."""

from __future__ import annotations

from lora_fx.planning.diff import PlanDiff
from lora_fx.planning.plan import Plan
from lora_fx.planning.render.html import plan_diff_html, plan_html
from lora_fx.planning.render.tree import diff_tree, plan_tree, tree_dot, tree_mermaid


def plan_as(plan: Plan, form: str, fold: bool = True, stat: bool = False, width: int | None = None) -> str:
    """Return a plan as text, json, mermaid, dot or html."""
    if form == "json":
        return plan.to_json()
    if form == "html":
        return plan_html(plan, fold)
    if form in ("mermaid", "dot"):
        tree = plan_tree(plan)
        return tree_mermaid(tree) if form == "mermaid" else tree_dot(tree)
    return plan.stat() if stat else plan.text(fold, width)


def plan_diff_as(diff: PlanDiff, form: str, stat: bool = False) -> str:
    """Return the difference of two plans as text, json, mermaid, dot or html."""
    if form == "json":
        return diff.to_json()
    if form == "html":
        return plan_diff_html(diff)
    if form in ("mermaid", "dot"):
        tree = diff_tree(diff)
        return tree_mermaid(tree) if form == "mermaid" else tree_dot(tree)
    return diff.stat() if stat and diff else str(diff)
