"""Rows with dotted paths as a tree for pictures, in mermaid and in dot.  No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_fx.planning.diff import PlanDiff
from lora_fx.planning.plan import Plan
from lora_fx.planning.rows import rows_of
from lora_fx.text import count, listing

MOST_EDGES, MOST_CHARACTERS = 500, 50_000
"""What mermaid draws at most; past that a picture has a box for each rule instead of each site."""
_KINDS = {"+": "added", "-": "removed", "~": "changed", "!": "refused"}
_MERMAID = {
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
    kind: str = ""
    parts: dict[str, Branch] = field(default_factory=dict)
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
    *above, last = _parts(name)
    branch = root
    for part in above:
        branch = branch.parts.setdefault(part, Branch((part,)))
    title = " ".join(filter(None, (last, times)))
    if sign not in _KINDS:
        branch.kept.append(title)
        return
    leaf = branch.parts.setdefault(last, Branch((title,)))
    leaf.label, leaf.kind = (title, *label), _KINDS[sign]


def _parts(path: str) -> list[str]:
    """Split a path at its dots, but not at those of `{0..11}`."""
    return [part.replace("\0", "..") for part in path.replace("..", "\0").split(".")]


def _edges(branch: Branch) -> int:
    return bool(branch.kept) + sum(1 + _edges(part) for part in branch.parts.values())


def _by_rule(plan: Plan) -> Branch:
    root = Branch((plan.model, plan.source))
    for rule in dict.fromkeys(each.rule for each in plan.sites):
        sites = [each for each in plan.sites if each.rule == rule]
        kind = "kept" if rule is None else "added"
        root.parts[str(rule)] = Branch((rule or "no rule", count(len(sites), "site")), kind)
    return root


def _drawn(branch: Branch, number: Iterator[int], above: int | None) -> Iterator[tuple[int, int | None, Branch]]:
    """Yield (number, number of the box above, box) for each box."""
    own = next(number)
    yield own, above, branch
    for part in branch.parts.values():
        yield from _drawn(part, number, own)
    if branch.kept:
        label = (f"{count(len(branch.kept), 'site')} kept", listing(branch.kept, 4))
        yield next(number), own, Branch(label, "kept")


def _boxes(root: Branch) -> list[tuple[int, int | None, Branch]]:
    return list(_drawn(root, iter(range(1 << 30)), None))


def mermaid(root: Branch) -> str:
    """Return the tree as a flowchart of mermaid, as pull requests show it."""
    lines = ["flowchart LR"]
    boxes = _boxes(root)
    lines += [f'  n{own}["{"<br>".join(map(_mermaid_text, box.label))}"]{_class(box)}' for own, _, box in boxes]
    lines += [f"  n{above} --- n{own}" for own, above, _ in boxes if above is not None]
    used = sorted({box.kind for _, _, box in boxes if box.kind})
    return "\n".join([*lines, *(f"  classDef {kind} {_MERMAID[kind]}" for kind in used)])


def _class(box: Branch) -> str:
    return f":::{box.kind}" if box.kind else ""


def _mermaid_text(text: str) -> str:
    escaped = text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
    return escaped.replace("`", "#96;")


def dot(root: Branch, name: str = "plan") -> str:
    """Return the tree in the language of Graphviz."""
    lines = [f"digraph {name} {{", "  rankdir=LR", '  node [shape=box, style="filled,rounded", fillcolor=white]']
    for own, above, box in _boxes(root):
        colours = dict(each.split(":") for each in _MERMAID[box.kind].split(",")) if box.kind else {}
        look = f', fillcolor="{colours["fill"]}", color="{colours["stroke"]}"' if colours else ""
        label = "\\n".join(map(_dot_text, box.label))
        lines.append(f'  n{own} [label="{label}"{look}]')
        lines += [] if above is None else [f"  n{above} -> n{own} [arrowhead=none]"]
    return "\n".join([*lines, "}"])


def _dot_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
