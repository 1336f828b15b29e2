"""What pictures show of a diff: blocks, each kind once, with the statements of both sides as one list."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_fx.graphdiff.changes import Comparison, Merged, merged
from lora_fx.graphdiff.graphs import INPUT, Statement
from lora_fx.graphdiff.render.text import without_numbers
from lora_fx.text import visible

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
    """Return the blocks of both graphs, equal ones once, in the order of b.

    A block is a region of the capture; in a graph without regions, a module of a numbered list, if it is repeated.
    """
    order = merged(len(compared.b.nodes), compared.partner, compared.in_order)
    owners = _owners([_shown(compared, i, j) for i, j, _ in order])
    members: dict[str, list[int]] = {}
    for position, owner in enumerate(owners):
        members.setdefault(owner, []).append(position)
    steps = _steps(compared, order, owners)
    number = {position: k for positions in members.values() for k, position in enumerate(positions)}
    edges = _edges(compared, order, owners, number)
    kinds: dict[object, Block] = {}
    for owner, positions in members.items():
        block = Block([owner], [steps[position] for position in positions], edges.get(owner, {}))
        known = kinds.setdefault(_kind(block), block)
        if known is not block:
            known.paths.append(owner)
            known.steps = [_for_both(one, other) for one, other in zip(known.steps, block.steps, strict=True)]
        known.rules.update(step.rule for step in block.steps if step.rule)
    return list(kinds.values())


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

    def owner(path: str) -> str:
        fitting = (p for p in _prefixes(path) if sizes[p] <= _MOST_STEPS and repeated[_NUMBER.sub("#", p)] > 1)
        return next(fitting, "")

    return [node.region or owner(node.path) for node in nodes]


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end, part in enumerate(parts) if part.isdigit()]


def _steps(compared: Comparison, order: Merged, owners: Sequence[str]) -> list[Step]:
    edited = {edit.before for edit in compared.edits}
    steps: list[Step] = []
    for (i, j, moved), owner in zip(order, owners, strict=True):
        node = _shown(compared, i, j)
        inside = node.path.removeprefix(owner).lstrip(".") if owner else node.path
        before = "" if i is None else compared.lines[0][i]
        after = "" if j is None else compared.lines[1][j]
        if node.op == INPUT:
            before, after = (f"{line}input" if line else "" for line in (before, after))
        both = MOVED if moved else CHANGED if i in edited else SAME
        status = ADDED if i is None else REMOVED if j is None else both
        inside, op, value, rule = map(visible, (inside, node.op, node.value, node.rule))
        steps.append(Step(status, inside, op, before, after, value, rule))
    return steps


def _edges(
    compared: Comparison, order: Merged, owners: Sequence[str], number: Mapping[int, int]
) -> dict[str, dict[tuple[int, int], str]]:
    """Return what flows between the steps of each block, by their numbers in it, on which sides.

    Args:
        compared: both graphs.
        order: their nodes as one list.
        owners: the block of each entry of the list.
        number: of each entry in its block.
    """
    flows: dict[str, dict[tuple[int, int], str]] = {}
    for side, graph in enumerate((compared.a, compared.b)):
        position = {entry[side]: k for k, entry in enumerate(order) if entry[side] is not None}
        for i, node in enumerate(graph.nodes):
            target = position[i]
            own = flows.setdefault(owners[target], {})
            for source in dict.fromkeys(position[k] for k in node.inputs if owners[position[k]] == owners[target]):
                edge = number[source], number[target]
                own[edge] = SAME if edge in own else (REMOVED, ADDED)[side]
    return flows


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
    """Return the boxes of a block, and the edges between them: (from, to) → same, added or removed."""
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
