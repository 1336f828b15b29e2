"""Plans and their differences in each of the formats.  No torch here."""

from collections.abc import Callable

from lora_fx.planning.diff import PlanDiff
from lora_fx.planning.plan import Plan
from lora_fx.planning.render.tree import diff_tree, plan_tree, tree_dot, tree_mermaid


def plan_as(plan: Plan, form: str, fold: bool = True, stat: bool = False, width: int | None = None) -> str:
    """Return a plan as text, json, mermaid, dot or html."""
    forms: dict[str, Callable[[], str]] = {
        "json": plan.to_json,
        "html": lambda: plan.to_html(fold),
        "mermaid": lambda: tree_mermaid(plan_tree(plan)),
        "dot": lambda: tree_dot(plan_tree(plan)),
        "text": plan.stat if stat else lambda: plan.text(fold, width),
    }
    return forms[form]()


def plan_diff_as(diff: PlanDiff, form: str, stat: bool = False) -> str:
    """Return the difference of two plans as text, json, mermaid, dot or html."""
    forms: dict[str, Callable[[], str]] = {
        "json": diff.to_json,
        "html": diff.to_html,
        "mermaid": lambda: tree_mermaid(diff_tree(diff)),
        "dot": lambda: tree_dot(diff_tree(diff)),
        "text": diff.stat if stat and diff else diff.__str__,
    }
    return forms[form]()
