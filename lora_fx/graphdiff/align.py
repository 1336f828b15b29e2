"""Which node of one graph is which of another, in nearly linear time.

1. By module path: nodes that compute the same from the same, or are used alike, or have the same neighbours; then by
   operation and occurrence.
2. What is left may have moved: by structural hash, whatever the path.
3. From pairs to their neighbours, and between modules that have been renamed.
4. As many as are left at a path on both sides: one operation in the place of another.

The hashes are numbers that stand for structures exactly (one table for both graphs), so none collide.  Own code, since
networkx' Weisfeiler-Lehman hashes can collide, look one way only, and take 2.8 s for one of the four kinds of hashes in
two graphs of 50,000 nodes (1.1 s of it to build the graphs), where all four take 1.5 s here.
"""

import hashlib
import re
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from lora_fx.graphdiff.graphs import INPUT, RETURN, Graph, Statement

_SELF = re.compile(r"self\.[\w.]+")
_MOST_CELLS = 250_000
"""Size of the largest table for a longest common subsequence."""


def align(a: Graph, b: Graph) -> list[int | None]:
    """Return, for each node of `a`, the position of the same node in `b`, or None.

    No node of `b` is taken twice.  Swapped graphs can be aligned otherwise where there is a choice: see `digest`.
    """
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

    nodes: tuple[Statement, ...]
    users: list[list[tuple[int, int]]]
    """For each node, who takes it as which input: (position, number of the input)."""
    partner: list[int | None]
    labels: list[int]
    """The operation with its constants, by number."""
    above: list[int]
    """The node and all that it is computed from."""
    below: list[int]
    """The node and all that is computed from it."""
    near: list[int]
    """The node, two steps up and two down."""


Key = Callable[[_Side, int], Hashable]


class _Alignment:
    """One alignment under way."""

    def __init__(self, a: Graph, b: Graph) -> None:
        numbers: defaultdict[Hashable, int] = defaultdict(lambda: len(numbers))
        self.a, self.b = _described(a, numbers), _described(b, numbers)
        self.waiting: deque[tuple[int, int]] = deque()

    def run(self) -> list[int | None]:
        self._by_key(lambda side, i: (side.nodes[i].path, side.above[i], side.below[i]))
        self._by_key(lambda side, i: (side.nodes[i].path, side.above[i]))
        self._by_key(lambda side, i: (side.nodes[i].path, side.below[i]))
        self._by_key(lambda side, i: (side.nodes[i].path, side.near[i]))
        self._by_key(lambda side, i: (side.nodes[i].path, side.nodes[i].op), in_part=True)
        self._moved()
        self._neighbours()
        self._renamed()
        self._by_key(lambda side, i: (side.nodes[i].path, side.nodes[i].op in (INPUT, RETURN)))  # one became another
        return self.a.partner

    def _pair(self, i: int, j: int) -> None:
        self.a.partner[i], self.b.partner[j] = j, i
        self.waiting.append((i, j))

    def _by_key(self, key: Key, in_part: bool = False) -> None:
        """Pair the free nodes of each key in order, where both sides have equally many; `in_part`: else by sequence."""
        groups, of_b = _grouped(self.a, key), _grouped(self.b, key)
        for mine, others in ((group, of_b[value]) for value, group in groups.items() if value in of_b):
            if len(mine) == len(others):
                for i, j in zip(mine, others, strict=True):
                    self._pair(i, j)
            elif in_part and len(mine) * len(others) <= _MOST_CELLS:
                labels = [self.a.labels[i] for i in mine], [self.b.labels[j] for j in others]
                for i, j in common_subsequence(*labels):
                    self._pair(mine[i], others[j])

    # -- what has moved

    def _moved(self) -> None:
        """Pair what has the same structure elsewhere; a structure of one node says too little."""
        self._by_key(lambda side, i: (side.above[i], side.below[i]))
        self._by_key(lambda side, i: side.above[i] if side.nodes[i].inputs else (side.above[i], side.nodes[i].path))
        self._by_key(lambda side, i: side.below[i] if side.users[i] else (side.below[i], side.nodes[i].path))

    def _renamed(self) -> None:
        """Pair what is left of modules most of which have gone to one other module."""
        votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for i, j in enumerate(self.a.partner):
            if j is not None:
                votes[self.a.nodes[i].path][self.b.nodes[j].path] += 1
        new = {path: min(counts, key=lambda other: (-counts[other], other)) for path, counts in votes.items()}

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
            mine, others = _free_users(self.a, i), _free_users(self.b, j)
            for key, users in mine.items():
                if len(users) == 1 and len(others.get(key, ())) == 1:
                    self._try(users[0], others[key][0])

    def _try(self, i: int, j: int) -> None:
        free = self.a.partner[i] is None and self.b.partner[j] is None
        if free and self.a.nodes[i].op == self.b.nodes[j].op:
            self._pair(i, j)


def _free_users(side: _Side, i: int) -> dict[tuple[str, int], list[int]]:
    """Return the users of a node that have no partner yet, by operation and number of the input."""
    users: dict[tuple[str, int], list[int]] = {}
    for user, slot in side.users[i]:
        if side.partner[user] is None:
            users.setdefault((side.nodes[user].op, slot), []).append(user)
    return users


def _grouped(side: _Side, key: Key) -> dict[Hashable, list[int]]:
    """Return the free nodes of a side by their keys."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i, other in enumerate(side.partner):
        if other is None:
            groups[key(side, i)].append(i)
    return groups


def _described(graph: Graph, numbers: defaultdict[Hashable, int]) -> _Side:
    """Return a graph with its hashes; `numbers` gives each structure a number of its own."""
    nodes, size = graph.nodes, len(graph.nodes)
    users: list[list[tuple[int, int]]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for slot, source in enumerate(node.inputs):
            users[source].append((i, slot))
    labels = [numbers[_label(node)] for node in nodes]
    above, below, near = [0] * size, [0] * size, labels
    for i, node in enumerate(nodes):
        above[i] = numbers["above", labels[i], tuple(above[source] for source in node.inputs)]
    for i in reversed(range(size)):
        below[i] = numbers["below", labels[i], _numbers_of_users(below, users[i])]
    for _ in range(2):
        inputs = (tuple(near[source] for source in node.inputs) for node in nodes)
        around = [("near", near[i], up, _numbers_of_users(near, users[i])) for i, up in enumerate(inputs)]
        near = [numbers[structure] for structure in around]
    return _Side(nodes, users, [None] * size, labels, above, below, near)


def _label(node: Statement) -> tuple[str, str]:
    """Return the operation with its constants; where its modules are does not count."""
    return node.op, node.name if node.op == INPUT else _SELF.sub("self.", node.code)


def _numbers_of_users(numbers: Sequence[int], users: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((numbers[user], slot) for user, slot in users))


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of positions of a longest common subsequence, in time and memory len(a) · len(b).

    difflib's matcher would not do: it looks for long runs, and what it returns need not be longest.
    """
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
    chain: list[int] = []
    position = positions[-1] if positions else -1
    while position >= 0:
        chain.append(position)
        position = previous[position]
    return chain[::-1]
