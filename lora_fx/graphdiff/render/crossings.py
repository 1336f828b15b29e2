"""The order of boxes and lanes in each row: one in which few edges cross (sweeps by barycentres, then exchanges)."""

from bisect import bisect_right, insort
from collections.abc import Sequence

from lora_fx.graphdiff.render.lanes import Layers

_SWEEPS, _PATIENCE, _EXCHANGES = 24, 6, 8
"""Sweeps at most, sweeps without gain after which it ends, rounds of exchanges at most."""
Rows = Sequence[Sequence[int]]


def ordered(layers: Layers) -> list[list[int]]:
    """Return the rows, each from left to right: the best order that was met, the same for equal layers."""
    best = rows = _first(layers)
    fewest, waited = crossings(layers, rows), 0
    for sweep in range(_SWEEPS):
        if not fewest or waited == _PATIENCE:
            break
        rows = _swept(layers, rows, down=sweep % 2 == 0, reverse=sweep % 4 > 1)
        number, waited = crossings(layers, rows), waited + 1
        if number < fewest:
            best, fewest, waited = rows, number, 0
    return _exchanged(layers, best) if fewest else best


def crossings(layers: Layers, rows: Rows) -> int:
    """Return how many pairs of edges cross between neighbouring rows in this order."""
    places, number = places_of(rows), 0
    for row in rows:
        passed: list[int] = []
        for one in row:
            ends = sorted(places[other] for other in layers.below[one])
            number += sum(len(passed) - bisect_right(passed, end) for end in ends)
            for end in ends:
                insort(passed, end)
    return number


def places_of(rows: Rows) -> dict[int, int]:
    """Return the place of each box and lane in its row."""
    return {one: place for row in rows for place, one in enumerate(row)}


def _first(layers: Layers) -> list[list[int]]:
    """Return rows in the order in which a walk in depth meets boxes and lanes: no edges of a tree cross."""
    rows: list[list[int]] = [[] for _ in layers.rows]
    met: set[int] = set()
    for start in (one for row in layers.rows for one in row):
        waiting = [start]
        while waiting:
            one = waiting.pop()
            if one not in met:
                met.add(one)
                rows[layers.row[one]].append(one)
                waiting += reversed(layers.below[one])
    return rows


def _swept(layers: Layers, rows: Rows, down: bool, reverse: bool) -> list[list[int]]:
    """Return the rows with each sorted by the middle of what it is joined with in the one before, down or up.

    Args:
        layers: what is joined with what.
        rows: the order so far.
        down: whether it begins with the first row.
        reverse: whether those with equal middles change their order, or else keep it.
    """
    swept, places = [list(row) for row in rows], places_of(rows)
    joined = layers.above if down else layers.below
    for row in swept if down else reversed(swept):
        middle = {one: sum(places[other] for other in joined[one]) / len(joined[one]) for one in row if joined[one]}
        movable = iter(sorted(reversed(middle) if reverse else middle, key=middle.__getitem__))
        row[:] = [next(movable) if one in middle else one for one in row]
        places |= {one: place for place, one in enumerate(row)}
    return swept


def _exchanged(layers: Layers, rows: Rows) -> list[list[int]]:
    """Return the rows with neighbours exchanged as long as that takes crossings away."""
    exchanged, places = [list(row) for row in rows], places_of(rows)

    def lost(one: int, other: int) -> int:
        """Return how many crossings fewer there are with the other on the left of the one."""
        pairs = (
            (places[a], places[b])
            for joined in (layers.above, layers.below)
            for a in joined[one]
            for b in joined[other]
        )
        return sum((a > b) - (a < b) for a, b in pairs)

    for _ in range(_EXCHANGES):
        better = False
        for row in exchanged:
            for place in range(len(row) - 1):
                one, other = row[place : place + 2]
                if lost(one, other) > 0:
                    row[place : place + 2] = other, one
                    places[one], places[other], better = place + 1, place, True
        if not better:
            break
    return exchanged
