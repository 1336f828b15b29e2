"""Where boxes and lanes stand from left to right: long edges straight, boxes near what they are joined with.

After Brandes and Köpf, "Fast and simple horizontal coordinate assignment" (2001): four layouts, each leaning to one
corner, whose mean keeps every distance; blocks are packed by longest paths, which needs no classes.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise

from lora_fx.graphdiff.render.crossings import Rows, places_of
from lora_fx.graphdiff.render.lanes import Layers

GAP = 20
"""Between boxes, in pixels."""
_BESIDE = 8
"""Between a box and a lane, in pixels."""


def columns(layers: Layers, rows: Rows, widths: Sequence[float]) -> list[float]:
    """Return the middle of each box and lane, in pixels; the leftmost edge is at 0.

    Args:
        layers: what is joined with what.
        rows: the order in each row.
        widths: of each box and lane.
    """
    layouts: list[tuple[bool, list[float]]] = []
    for downwards in (True, False):
        for rightwards in (True, False):
            seen = [list(row) if rightwards else list(row)[::-1] for row in rows]
            joined = layers.above if downwards else layers.below
            blocks = _blocks(layers, seen if downwards else seen[::-1], joined)
            middles = _packed(layers, seen, blocks, widths)
            layouts.append((rightwards, middles if rightwards else [-middle for middle in middles]))
    return _balanced(layouts, widths)


def _balanced(layouts: Sequence[tuple[bool, list[float]]], widths: Sequence[float]) -> list[float]:
    """Return the mean of the middle two of four layouts, once each is moved to a border of the narrowest."""
    borders = []
    for _, middles in layouts:
        sides = [(middle - width / 2, middle + width / 2) for middle, width in zip(middles, widths, strict=True)]
        borders.append((min((low for low, _ in sides), default=0.0), max((high for _, high in sides), default=0.0)))
    low, high = min(borders, key=lambda border: border[1] - border[0])
    moved = []
    for (rightwards, middles), (left, right) in zip(layouts, borders, strict=True):
        shift = low - left if rightwards else high - right
        moved.append([middle + shift for middle in middles])
    means = [sum(sorted(four)[1:3]) / 2 for four in zip(*moved, strict=True)]
    left = min((mean - width / 2 for mean, width in zip(means, widths, strict=True)), default=0.0)
    return [float(round(mean - left)) for mean in means]


def _blocks(layers: Layers, rows: Rows, joined: Sequence[Sequence[int]]) -> list[int]:
    """Return the block of each box and lane, named by its first: what is to stand exactly one below the other.

    Each is aligned with the middle one of its like that it is joined with in the row before, boxes first, then lanes;
    last a box with a lane.  No alignment crosses another.
    """
    places, block = places_of(rows), list(range(len(layers.row)))
    for row in rows:
        before: list[int] = []
        own: list[int] = []
        for _, place, _, other in sorted(_wanted(layers, row, joined, places)):
            at = bisect_left(own, place)
            is_aligned = at < len(own) and own[at] == place
            follows = at == 0 or before[at - 1] < places[other]
            leads = at == len(own) or places[other] < before[at]
            if follows and leads and not is_aligned:
                own.insert(at, place)
                before.insert(at, places[other])
                block[row[place]] = block[other]
    return block


def _wanted(
    layers: Layers, row: Sequence[int], joined: Sequence[Sequence[int]], places: Mapping[int, int]
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (how late it is looked at, place in the row, place and number of what it would be aligned with)."""
    for place, one in enumerate(row):
        is_lane = one >= layers.boxes
        alike = [other for other in joined[one] if (other >= layers.boxes) == is_lane]
        others = sorted(alike or joined[one], key=places.__getitem__)
        for other in others[(len(others) - 1) // 2 : len(others) // 2 + 1]:
            yield (int(is_lane) if alike else 2), place, places[other], other


def _packed(layers: Layers, rows: Rows, block: Sequence[int], widths: Sequence[float]) -> list[float]:
    """Return the middles with each block as far left as those before it let it, then as near to those after it."""
    before: dict[int, dict[int, float]] = {name: {} for name in block}
    after: dict[int, dict[int, float]] = {name: {} for name in block}
    for row in rows:
        for left, right in pairwise(row):
            between = (GAP, _BESIDE, 0)[(left >= layers.boxes) + (right >= layers.boxes)]
            room = (widths[left] + widths[right]) / 2 + between
            one, other = block[left], block[right]
            before[other][one] = after[one][other] = max(room, before[other].get(one, 0.0))
    order = list(TopologicalSorter(before).static_order())
    at: dict[int, float] = {}
    for name in order:
        at[name] = max((at[other] + room for other, room in before[name].items()), default=0.0)
    for name in reversed(order):
        at[name] = max(at[name], min((at[other] - room for other, room in after[name].items()), default=at[name]))
    return [at[name] for name in block]
