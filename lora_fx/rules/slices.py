"""The `slices` of a rule: the parts of a fused weight."""

from __future__ import annotations

import itertools
import re

from lora_fx.rules.keys import ROWS, SLICES
from lora_fx.rules.nodes import NodeReader
from lora_fx.rules.ruleset import Slice, Slices
from lora_fx.rules.tree import YamlNode
from lora_fx.text import nearest


def read_slices(reading: NodeReader, node: YamlNode) -> Slices | None:
    """Return the slices that a node describes; None, with the problems noted, if it describes none."""
    found = reading.mapping(node, "slices", SLICES)
    if "of" not in found or "adapt" not in found:
        return None
    parts = _parts(reading, found["of"])
    names = [part.name for part in parts]
    adapt = reading.several(found["adapt"], "adapt", reading.text)
    for item in found["adapt"].items or ():
        if names and isinstance(item.value, str) and item.value not in names:
            similar = nearest(item.value, names, most=1)
            guess = f"did you mean '{similar[0]}'?  " if similar else ""
            reading.problem(item.span, f"'{item.value}' is no part", f"{guess}parts: {', '.join(names)}")
    if len(set(adapt)) != len(adapt):
        reading.problem(found["adapt"].span, "adapt names a part twice")
    return Slices(parts, adapt)


def _parts(reading: NodeReader, node: YamlNode) -> tuple[Slice, ...]:
    if node.items is not None:
        names = reading.several(node, "of", reading.text)
        if len(set(names)) != len(names):
            reading.problem(node.span, "of names a part twice")
        parts = tuple(Slice(name) for name in names)
    elif node.pairs is not None:
        parts = tuple(_sized(reading, str(key.value), value) for key, value in node.pairs)
        _check_overlaps(reading, node, parts)
        _check_uniform(reading, node, parts)
    else:
        reading.problem(node.span, f"of must be a list of names or a mapping, found {node.kind}")
        return ()
    if len(parts) < 2:
        reading.problem(node.span, "of needs at least two parts")
    return parts


def _sized(reading: NodeReader, name: str, node: YamlNode) -> Slice:
    if isinstance(node.value, str) or node.items is not None:
        ranges = reading.one_or_more(node, f"rows of '{name}'", lambda item, what: _range(reading, item, what))
        return Slice(name, None, ranges)
    return Slice(name, reading.integer(node, f"rows of '{name}'", 1))


def _range(reading: NodeReader, node: YamlNode, what: str) -> tuple[int, int] | None:
    match = re.fullmatch(ROWS, node.value) if isinstance(node.value, str) else None
    if match is None:
        reading.problem(node.span, f'{what} must be like "0..64", found {node.kind}')
        return None
    first, end = int(match[1]), int(match[2])
    if first >= end:
        reading.problem(node.span, f"{what}: the range {first}..{end} is empty (the end is not included)")
        return None
    return (first, end)


def _check_overlaps(reading: NodeReader, node: YamlNode, parts: tuple[Slice, ...]) -> None:
    ranges = sorted((rows, part.name) for part in parts for rows in part.rows)
    for (one, first), (other, second) in itertools.pairwise(ranges):
        if other[0] < one[1]:
            reading.problem(node.span, f"rows {other[0]}..{min(one[1], other[1])} belong to '{first}' and '{second}'")


def _check_uniform(reading: NodeReader, node: YamlNode, parts: tuple[Slice, ...]) -> None:
    if any(part.rows for part in parts) and any(part.size is not None for part in parts):
        reading.problem(node.span, "give all parts a number of rows, or all of them ranges")
