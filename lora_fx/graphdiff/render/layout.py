"""Where the boxes of a picture stand: in rows by what they are computed from, and near it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WIDTH, HEIGHT, GAP, ROW = 216, 42, 20, 74
_MARGIN = 40
"""Room on the right, for lines that go around boxes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Left upper corners of the boxes, and the size of the whole."""

    corners: list[tuple[float, float]]
    width: float
    height: float


def layered(number: int, edges: Iterable[tuple[int, int]]) -> Layout:
    """Return places for `number` boxes; edges that go backwards do not count."""
    above: list[list[int]] = [[] for _ in range(number)]
    for source, target in edges:
        if source < target:
            above[target].append(source)
    rows: list[int] = []
    for inputs in above:
        rows.append(1 + max((rows[each] for each in inputs), default=-1))
    _pull_down(rows, above)
    columns = _columns(rows, above)
    widest = max((sum(row == each for each in rows) for row in set(rows)), default=1)
    width = widest * (WIDTH + GAP) + GAP
    counts = {row: sum(row == each for each in rows) for row in set(rows)}
    corners: list[tuple[float, float]] = []
    for row, column in zip(rows, columns, strict=True):
        left = (width - counts[row] * (WIDTH + GAP) + GAP) / 2
        corners.append((left + column * (WIDTH + GAP), GAP + row * ROW))
    return Layout(corners, width + _MARGIN, GAP + (1 + max(rows, default=0)) * ROW)


def _pull_down(rows: list[int], above: list[list[int]]) -> None:
    """Put boxes without inputs just above what uses them."""
    users: dict[int, list[int]] = {}
    for target, inputs in enumerate(above):
        for source in inputs:
            users.setdefault(source, []).append(target)
    for box in reversed(range(len(rows))):
        if not above[box] and box in users:
            rows[box] = min(rows[user] for user in users[box]) - 1


def _columns(rows: list[int], above: list[list[int]]) -> list[int]:
    """Return the place of each box in its row: in the order of the middles of its inputs."""
    by_row: dict[int, list[int]] = {}
    for box, row in enumerate(rows):
        by_row.setdefault(row, []).append(box)
    middle = [0.0] * len(rows)
    column = [0] * len(rows)
    for row in sorted(by_row):
        boxes = by_row[row]
        wanted = {box: _mean([middle[each] for each in above[box]], 0.0) for box in boxes}
        boxes.sort(key=lambda box: (wanted[box], box))
        for place, box in enumerate(boxes):
            column[box], middle[box] = place, place - (len(boxes) - 1) / 2
    return column


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
