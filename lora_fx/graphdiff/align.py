"""Which node of one graph is which of another, in nearly linear time.

1. By module path: nodes that compute the same from the same, or are used alike, or have the same neighbours; then by
   operation and occurrence.
2. What is left may have moved: by structural hash, whatever the path.
3. From pairs to their neighbours, and between modules that have been renamed.
4. As many as are left at a path on both sides: one operation in the place of another.

The hashes are numbers that stand for structures exactly (one table for both graphs), so none collide.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_fx.graphdiff.graphs import INPUT, RETURN, Graph, Statement, users_of

_SELF = re.compile(r"self\.[\w.]+")
_MOST_CELLS = 250_000
"""Size of the largest table for a longest common subsequence."""


def align(a: Graph, b: Graph) -> list[int | None]:
    """Return, for each node of `a`, the position of the same node in `b`, or None."""
    return _Alignment(a, b).run()


def digest(graph: Graph) -> tuple[int, bytes]:
    """Return by what two different graphs can be put in an order, whichever comes first."""
    text = hashlib.sha256()
    for node in graph.nodes:
        text.update(repr((node.path, node.op, node.name, node.code, node.inputs, node.region)).encode())
    return len(graph.nodes), text.digest()


@dataclass(slots=True)
class _Side:
    """One graph with what alignment asks of it."""

    graph: Graph
    labels: list[int] = field(default_factory=list)
    """The operation with its constants, by number."""
    above: list[int] = field(default_factory=list)
    """The node and all that it is computed from."""
    below: list[int] = field(default_factory=list)
    """The node and all that is computed from it."""
    near: list[int] = field(default_factory=list)
    """The node, two steps up and two down."""
    users: list[list[tuple[int, int]]] = field(default_factory=list)
    partner: list[int | None] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[Statement, ...]:
        return self.graph.nodes

    def free(self) -> list[int]:
        return [i for i, other in enumerate(self.partner) if other is None]


class _Numbers(dict[Hashable, int]):
    """Gives each structure a number of its own."""

    def of(self, structure: Hashable) -> int:
        return self.setdefault(structure, len(self))


Key = Callable[[_Side, int], Hashable]


class _Alignment:
    """One alignment under way."""

    def __init__(self, a: Graph, b: Graph) -> None:
        numbers = _Numbers()
        self.a, self.b = _described(a, numbers), _described(b, numbers)
        self.waiting: deque[tuple[int, int]] = deque()

    def run(self) -> list[int | None]:
        place: Key = lambda side, i: side.nodes[i].path  # noqa: E731
        self._by_key(lambda side, i: (place(side, i), side.above[i], side.below[i]))
        self._by_key(lambda side, i: (place(side, i), side.above[i]))
        self._by_key(lambda side, i: (place(side, i), side.below[i]))
        self._by_key(lambda side, i: (place(side, i), side.near[i]))
        self._by_key(lambda side, i: (place(side, i), side.nodes[i].op), in_part=True)
        self._moved()
        self._neighbours()
        self._renamed()
        self._by_key(lambda side, i: (place(side, i), side.nodes[i].op in (INPUT, RETURN)))  # one became another
        return self.a.partner

    def _pair(self, i: int, j: int) -> None:
        self.a.partner[i], self.b.partner[j] = j, i
        self.waiting.append((i, j))

    def _by_key(self, key: Key, in_part: bool = False) -> None:
        """Pair the free nodes of each key in order, where both sides have equally many; `in_part`: else by sequence."""
        for mine, others in self._groups(key):
            if len(mine) == len(others):
                for i, j in zip(mine, others, strict=True):
                    self._pair(i, j)
            elif in_part and len(mine) * len(others) <= _MOST_CELLS:
                labels = [self.a.labels[i] for i in mine], [self.b.labels[j] for j in others]
                for i, j in common_subsequence(*labels):
                    self._pair(mine[i], others[j])

    def _groups(self, key: Key) -> Iterable[tuple[list[int], list[int]]]:
        """Yield the free nodes of both sides that have the same key."""
        mine, others = _grouped(self.a, key), _grouped(self.b, key)
        return [(group, others[each]) for each, group in mine.items() if each in others]

    # -- what has moved

    def _moved(self) -> None:
        """Pair what has the same structure elsewhere; a structure of one node says too little."""
        self._by_key(lambda side, i: (side.above[i], side.below[i]))
        self._by_key(lambda side, i: side.above[i] if side.nodes[i].inputs else (side.above[i], side.nodes[i].path))
        self._by_key(lambda side, i: side.below[i] if side.users[i] else (side.below[i], side.nodes[i].path))

    def _renamed(self) -> None:
        """Pair what is left of modules most of which have gone to one other module."""
        votes: dict[str, Counter[str]] = {}
        for i, j in enumerate(self.a.partner):
            if j is not None:
                votes.setdefault(self.a.nodes[i].path, Counter())[self.b.nodes[j].path] += 1
        new = {path: min(found, key=lambda other: (-found[other], other)) for path, found in votes.items()}

        def key(side: _Side, i: int) -> Hashable:
            path = side.nodes[i].path
            return (new.get(path, path) if side is self.a else path, side.nodes[i].op)

        self._by_key(key)
        self._neighbours()

    # -- neighbours

    def _neighbours(self) -> None:
        """Pair the free inputs and users of pairs that are of one operation."""
        while self.waiting:
            i, j = self.waiting.popleft()
            for up, other in zip(self.a.nodes[i].inputs, self.b.nodes[j].inputs, strict=False):
                self._try(up, other)
            mine, others = self._free_users(self.a, i), self._free_users(self.b, j)
            for key, found in mine.items():
                if len(found) == 1 and len(others.get(key, ())) == 1:
                    self._try(found[0], others[key][0])

    def _free_users(self, side: _Side, i: int) -> dict[tuple[str, int], list[int]]:
        found: dict[tuple[str, int], list[int]] = {}
        for user, slot in side.users[i]:
            if side.partner[user] is None:
                found.setdefault((side.nodes[user].op, slot), []).append(user)
        return found

    def _try(self, i: int, j: int) -> None:
        free = self.a.partner[i] is None and self.b.partner[j] is None
        if free and self.a.nodes[i].op == self.b.nodes[j].op:
            self._pair(i, j)


def _grouped(side: _Side, key: Key) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = {}
    for i in side.free():
        found.setdefault(key(side, i), []).append(i)
    return found


def _described(graph: Graph, numbers: _Numbers) -> _Side:
    nodes = graph.nodes
    side = _Side(graph, users=users_of(graph), partner=[None] * len(nodes))
    side.labels = [numbers.of(_label(node)) for node in nodes]
    for node, label in zip(nodes, side.labels, strict=True):
        side.above.append(numbers.of(("above", label, tuple(side.above[i] for i in node.inputs))))
    side.below = [0] * len(nodes)
    for i in reversed(range(len(nodes))):
        used = sorted((side.below[user], slot) for user, slot in side.users[i])
        side.below[i] = numbers.of(("below", side.labels[i], tuple(used)))
    side.near = side.labels
    for _ in range(2):
        side.near = [numbers.of(_surroundings(side, i)) for i in range(len(nodes))]
    return side


def _label(node: Statement) -> tuple[str, str]:
    """Return the operation with its constants; where its modules are does not count."""
    return node.op, node.name if node.op == INPUT else _SELF.sub("self.", node.code)


def _surroundings(side: _Side, i: int) -> tuple[Any, ...]:
    above = tuple(side.near[each] for each in side.nodes[i].inputs)
    below = tuple(sorted((side.near[user], slot) for user, slot in side.users[i]))
    return ("near", side.near[i], above, below)


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of positions of a longest common subsequence."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    pairs = [(i, i) for i in range(start)]
    rows, columns = len(a) - start, len(b) - start
    longest = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            same = a[start + i] == b[start + j]
            longest[i][j] = 1 + longest[i + 1][j + 1] if same else max(longest[i + 1][j], longest[i][j + 1])
    i = j = 0
    while i < rows and j < columns:
        if a[start + i] == b[start + j]:
            pairs.append((start + i, start + j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def increasing(values: Sequence[int]) -> list[int]:
    """Return the positions of a longest increasing subsequence of different values."""
    tails: list[int] = []
    positions: list[int] = []
    previous: list[int] = []
    for position, value in enumerate(values):
        slot = bisect_left(tails, value)
        previous.append(positions[slot - 1] if slot else -1)
        tails[slot : slot + 1], positions[slot : slot + 1] = [value], [position]
    found: list[int] = []
    position = positions[-1] if positions else -1
    while position >= 0:
        found.append(position)
        position = previous[position]
    return found[::-1]
