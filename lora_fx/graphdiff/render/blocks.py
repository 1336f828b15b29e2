"""What pictures show of a diff: blocks, each kind once, with the statements of both sides as one list."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lora_fx.graphdiff.changes import Comparison, merged
from lora_fx.graphdiff.graphs import INPUT, Statement
from lora_fx.graphdiff.render.text import without_numbers

SAME, CHANGED, ADDED, REMOVED, MOVED = "same", "changed", "added", "removed", "moved"
SYMBOLS = {SAME: " ", CHANGED: "±", ADDED: "+", REMOVED: "-", MOVED: "↷"}
_MOST_STEPS = 400
"""Number of statements of the largest part of a whole graph that is shown as one block."""
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Step:
    """A statement of either side, or of both."""

    status: str
    path: str
    """Within the block."""
    op: str
    before: str
    """Its line in a; empty if it is not there."""
    after: str
    value: str
    rule: str

    @property
    def label(self) -> str:
        """Its path in the block; for inputs and for what has no path what it is."""
        if self.op == INPUT:
            return (self.after or self.before).partition(" ")[0]
        return self.path or self.op


@dataclass(slots=True)
class Block:
    """One kind of block: its statements, and what flows between them."""

    paths: list[str]
    """Of all blocks of the kind; the first is the one that is shown."""
    steps: list[Step]
    edges: dict[tuple[int, int], str]
    """(from, to) → same, added or removed."""
    rules: Counter[str] = field(default_factory=Counter)

    @property
    def changed(self) -> bool:
        return any(step.status != SAME for step in self.steps)


def blocks_of(compared: Comparison) -> list[Block]:
    """Return the blocks of both graphs, equal ones once, in the order of b."""
    order = merged(len(compared.b.nodes), compared.partner, compared.in_order)
    edited = {edit.before for edit in compared.edits}, {edit.after for edit in compared.edits}
    owners = _owners([_shown(compared, i, j) for i, j, _ in order])
    members: dict[str, list[int]] = {}
    for position, owner in enumerate(owners):
        members.setdefault(owner, []).append(position)
    edges = _inner(_edges(compared, order), owners)
    found: dict[object, Block] = {}
    for owner, positions in members.items():
        steps = [_step(compared, *order[position], owner, edited) for position in positions]
        block = Block([owner], steps, edges.get(owner, {}))
        known = found.setdefault(_kind(block), block)
        if known is not block:
            known.paths.append(owner)
            known.steps = [_for_both(one, other) for one, other in zip(known.steps, steps, strict=True)]
        known.rules.update(step.rule for step in steps if step.rule)
    return list(found.values())


def _for_both(one: Step, other: Step) -> Step:
    """Return a step that says of two equal blocks only what is true of both."""
    value = one.value if one.value == other.value else ""
    rule = one.rule if one.rule == other.rule else "several rules"
    return one if (value, rule) == (one.value, one.rule) else replace(one, value=value, rule=rule)


def _shown(compared: Comparison, i: int | None, j: int | None) -> Statement:
    """Return the node as it is in b, else as it was in a."""
    if j is not None:
        return compared.b.nodes[j]
    assert i is not None
    return compared.a.nodes[i]


def _owners(nodes: Sequence[Statement]) -> list[str]:
    """Return the block of each node: its region, else the outermost numbered module that is small and repeated."""
    sizes = Counter(prefix for node in nodes if not node.region for prefix in _prefixes(node.path))
    repeated = Counter(_NUMBER.sub("#", prefix) for prefix in sizes)
    return [node.region or _owner(node.path, sizes, repeated) for node in nodes]


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end, part in enumerate(parts) if part.isdigit()]


def _owner(path: str, sizes: Counter[str], repeated: Counter[str]) -> str:
    fitting = [p for p in _prefixes(path) if sizes[p] <= _MOST_STEPS and repeated[_NUMBER.sub("#", p)] > 1]
    return fitting[0] if fitting else ""


def _step(
    compared: Comparison, i: int | None, j: int | None, moved: bool, owner: str, edited: tuple[set[int | None], ...]
) -> Step:
    node = _shown(compared, i, j)
    inside = node.path.removeprefix(owner).lstrip(".") if owner else node.path
    before = "" if i is None else compared.lines[0][i]
    after = "" if j is None else compared.lines[1][j]
    if node.op == INPUT:
        before, after = (f"{line}input" if line else "" for line in (before, after))
    return Step(_status(i, j, moved, edited), inside, node.op, before, after, node.value, node.rule)


def _status(i: int | None, j: int | None, moved: bool, edited: tuple[set[int | None], ...]) -> str:
    if i is None:
        return ADDED
    if j is None:
        return REMOVED
    return MOVED if moved else CHANGED if i in edited[0] else SAME


def _edges(compared: Comparison, order: Sequence[tuple[int | None, int | None, bool]]) -> dict[tuple[int, int], str]:
    """Return what flows between the entries of the merged list, on which sides."""
    found: dict[tuple[int, int], set[int]] = {}
    for side, graph in enumerate((compared.a, compared.b)):
        position = {entry[side]: k for k, entry in enumerate(order) if entry[side] is not None}
        for i, node in enumerate(graph.nodes):
            for each in node.inputs:
                found.setdefault((position[each], position[i]), set()).add(side)
    return {edge: SAME if len(sides) == 2 else ADDED if 1 in sides else REMOVED for edge, sides in found.items()}


def _inner(edges: dict[tuple[int, int], str], owners: Sequence[str]) -> dict[str, dict[tuple[int, int], str]]:
    """Return the edges inside each block, by the numbers of its own steps."""
    number, sizes = [], Counter[str]()
    for owner in owners:
        number.append(sizes[owner])
        sizes[owner] += 1
    found: dict[str, dict[tuple[int, int], str]] = {}
    for (source, target), status in edges.items():
        if owners[source] == owners[target]:
            found.setdefault(owners[source], {})[number[source], number[target]] = status
    return found


def _kind(block: Block) -> object:
    """Return what is equal for blocks that are shown once."""
    steps = tuple((s.status, s.path, s.op, *map(without_numbers, (s.before, s.after))) for s in block.steps)
    return steps, tuple(sorted(block.edges.items()))


# -- fewer boxes


@dataclass(slots=True)
class Box:
    """What is drawn as one: a statement that differs, or a run of equal ones of one module."""

    status: str
    path: str
    steps: list[Step]

    @property
    def label(self) -> str:
        return self.steps[0].label if len(self.steps) == 1 else self.path or "(block)"

    @property
    def detail(self) -> str:
        first = self.steps[0]
        return first.op if len(self.steps) == 1 else f"{len(self.steps)} statements"


def boxes_of(block: Block) -> tuple[list[Box], dict[tuple[int, int], str]]:
    """Return the boxes of a block and the edges between them."""
    boxes: list[Box] = []
    home: list[int] = []
    for step in block.steps:
        last = boxes[-1] if boxes else None
        joins = last is not None and step.status == SAME == last.status and step.path == last.path
        if last is None or not joins or INPUT in (step.op, last.steps[0].op):
            boxes.append(Box(step.status, step.path, []))
        boxes[-1].steps.append(step)
        home.append(len(boxes) - 1)
    edges: dict[tuple[int, int], str] = {}
    for (source, target), status in block.edges.items():
        edge = (home[source], home[target])
        if edge[0] != edge[1]:
            edges[edge] = status if edges.get(edge, status) == status else SAME
    return boxes, edges
