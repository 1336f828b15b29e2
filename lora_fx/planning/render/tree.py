"""A Plan, or the difference of two, as a tree of modules for pictures: in Mermaid and in Graphviz's language."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_fx.planning.diff import PlanDiff
from lora_fx.planning.plan import Plan
from lora_fx.planning.render.dot import digraph, quoted
from lora_fx.planning.render.mermaid import MOST_EDGES, box, flowchart
from lora_fx.planning.rows import rows_of
from lora_fx.text import count, listing

_KINDS = {"+": "added", "-": "removed", "~": "changed", "!": "refused"}
_LOOKS = {
    "added": "fill:#dcf5dc,stroke:#1b6e1b,color:#000",
    "removed": "fill:#fbdcdc,stroke:#a11,color:#000",
    "changed": "fill:#fff1c9,stroke:#8a6100,color:#000",
    "refused": "fill:#fbdcdc,stroke:#a11,color:#000,stroke-dasharray:4",
    "kept": "fill:#f2f2f2,stroke:#777,color:#333",
}


@dataclass(slots=True)
class Branch:
    """A module of the picture: what stands in its box, what lies in it."""

    label: tuple[str, ...]
    """Lines of text."""
    kind: str = ""
    """One of the classes of `_LOOKS`; empty for a module that only holds others."""
    parts: "dict[str, Branch]" = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    """Names of the sites in it with which nothing is done: one box for all."""


def plan_tree(plan: Plan) -> Branch:
    """Return the tree of a plan; by rule instead of by site where it would be too large to draw."""
    root = Branch((plan.model, plan.source))
    for path, weight, calls, doing, *_ in rows_of(plan.sites):
        _add(root, path, (" ".join(filter(None, (weight, calls))), doing), doing[0])
    return root if _edges(root) <= MOST_EDGES else _by_rule(plan)


def diff_tree(diff: PlanDiff) -> Branch:
    """Return the tree of what two plans decide otherwise."""
    root = Branch((f"{diff.a} → {diff.b}", diff.stat()))
    for path, before, after in diff.folded():
        sign = "~" if before and after else "+" if after else "-"
        _add(root, path, tuple(filter(None, (before and f"- {before}", after and f"+ {after}"))), sign)
    return root


def _add(root: Branch, path: str, label: tuple[str, ...], sign: str) -> None:
    name, _, times = path.partition("  ")
    *above, last = re.split(r"(?<!\.)\.(?!\.)", name)  # not at the dots of `{0..11}`
    branch = root
    for part in above:
        branch = branch.parts.setdefault(part, Branch((part,)))
    title = " ".join(filter(None, (last, times)))
    if sign not in _KINDS:
        branch.kept.append(title)
        return
    leaf = branch.parts.setdefault(last, Branch((title,)))
    leaf.label, leaf.kind = (title, *label), _KINDS[sign]


def _edges(branch: Branch) -> int:
    return bool(branch.kept) + sum(1 + _edges(part) for part in branch.parts.values())


def _by_rule(plan: Plan) -> Branch:
    root = Branch((plan.model, plan.source))
    names = ((site.rule, "trained whole" if site.decision == "train" else "no rule") for site in plan.sites)
    for (rule, otherwise), number in Counter(names).items():
        kind = "kept" if rule is None and otherwise == "no rule" else "added"
        root.parts[f"{rule}, {otherwise}"] = Branch((rule or otherwise, count(number, "site")), kind)
    return root


def _boxes(
    branch: Branch, numbers: Iterator[int], above: int | None = None
) -> Iterator[tuple[int, int | None, Branch]]:
    """Yield (number, number of the box above, box) for each box."""
    own = next(numbers)
    yield own, above, branch
    for part in branch.parts.values():
        yield from _boxes(part, numbers, own)
    if branch.kept:
        label = (f"{count(len(branch.kept), 'site')} kept", listing(branch.kept, 4))
        yield next(numbers), own, Branch(label, "kept")


def tree_mermaid(root: Branch) -> str:
    """Return the tree as a flowchart of Mermaid, as pull requests show it."""
    boxes = list(_boxes(root, itertools.count()))
    lines = [f"  {box(f'n{own}', branch.label, branch.kind)}" for own, _, branch in boxes]
    lines += [f"  n{above} --- n{own}" for own, above, _ in boxes if above is not None]
    used = sorted({branch.kind for *_, branch in boxes if branch.kind})
    return flowchart("LR", lines, {kind: _LOOKS[kind] for kind in used})


def tree_dot(root: Branch, name: str = "plan") -> str:
    """Return the tree in Graphviz's language."""
    lines = ["  rankdir=LR", '  node [shape=box, style="filled,rounded", fillcolor=white]']
    for own, above, branch in _boxes(root, itertools.count()):
        colours = dict(part.split(":") for part in _LOOKS[branch.kind].split(",")) if branch.kind else {}
        look = f', fillcolor="{colours["fill"]}", color="{colours["stroke"]}"' if colours else ""
        lines.append(f"  n{own} [label={quoted(chr(10).join(branch.label))}{look}]")
        lines += [] if above is None else [f"  n{above} -> n{own} [arrowhead=none]"]
    return digraph(name, lines)
