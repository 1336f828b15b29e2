"""The `slices` of a rule: the parts of a fused weight."""

import functools
import itertools
import re
from collections.abc import Iterable

from lora_fx.rules.keys import LEAST_PARTS, POSITIVE, ROWS, SLICES
from lora_fx.rules.nodes import NodeReader, did_you_mean
from lora_fx.rules.ruleset import Slice, Slices
from lora_fx.rules.tree import YamlNode
from lora_fx.text import listing, shortened


def read_slices(reader: NodeReader, node: YamlNode) -> Slices | None:
    """Return the slices that a node describes; None, with the problems noted, if it describes none."""
    given = reader.mapping(node, "slices", SLICES)
    if not given.keys() >= {"of", "adapt"}:
        return None
    parts = _parts(reader, given["of"])
    names = {part.name: None for part in parts}
    adapt = reader.several(given["adapt"], "adapt", reader.text)
    for item in given["adapt"].items or ():
        if names and isinstance(item.value, str) and item.value not in names:
            hint = functools.partial(_part_hint, item.value, names)
            reader.problem(item.span, f"'{shortened(item.value)}' is not a part", hint)
    if len(set(adapt)) != len(adapt):
        reader.problem(given["adapt"].span, "adapt names a part twice")
    return Slices(parts, adapt)


def _part_hint(name: str, names: Iterable[str]) -> str:
    return f"{did_you_mean(name, names)}parts: {listing(names, 20)}"


def _parts(reader: NodeReader, node: YamlNode) -> tuple[Slice, ...]:
    if node.items is not None:
        names = reader.several(node, "of", reader.text)
        if len(set(names)) != len(names):
            reader.problem(node.span, "of names a part twice")
        parts = tuple(Slice(name) for name in names)
    elif node.pairs is not None:
        parts = tuple(_sized(reader, str(key.value), value) for key, value in node.pairs)
        _check_overlaps(reader, node, parts)
        if any(part.rows for part in parts) and any(part.size is not None for part in parts):
            reader.problem(node.span, "give all parts a number of rows, or all of them ranges")
    else:
        reader.problem(node.span, f"of must be a list of names or a mapping, found {node.kind}")
        return ()
    if len(parts) < LEAST_PARTS:
        reader.problem(node.span, "of needs at least two parts")
    return parts


def _sized(reader: NodeReader, name: str, node: YamlNode) -> Slice:
    what = f"rows of '{shortened(name)}'"
    if isinstance(node.value, str) or node.items is not None:
        return Slice(name, None, reader.one_or_more(node, what, functools.partial(_range, reader)))
    return Slice(name, reader.typed(node, what, POSITIVE))


def _range(reader: NodeReader, node: YamlNode, what: str) -> tuple[int, int] | None:
    match = re.fullmatch(ROWS, node.value) if isinstance(node.value, str) else None
    if match is None:
        reader.problem(node.span, f'{what} must be like "0..64", found {node.kind}')
        return None
    first, end = int(match[1]), int(match[2])
    if first >= end:
        reader.problem(node.span, f"{what}: the range {first}..{end} is empty (the end is not included)")
        return None
    return (first, end)


def _check_overlaps(reader: NodeReader, node: YamlNode, parts: tuple[Slice, ...]) -> None:
    ranges = sorted((rows, part.name) for part in parts for rows in part.rows)
    for (one, first), (other, second) in itertools.pairwise(ranges):
        if other[0] < one[1]:
            reader.problem(
                node.span,
                f"rows {other[0]}..{min(one[1], other[1])} belong to '{shortened(first)}' and '{shortened(second)}'",
            )
