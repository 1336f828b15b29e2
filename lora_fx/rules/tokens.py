"""An entry under `tokens`: rows of embeddings that are trained alone."""

import functools
import re
from collections import Counter

from lora_fx.rules.keys import LARGEST_ID, MOST_IDS, ROWS, TOKENS
from lora_fx.rules.nodes import NodeReader
from lora_fx.rules.ruleset import TokenRule
from lora_fx.rules.tree import YamlNode
from lora_fx.text import listing, shortened


def read_tokens(reader: NodeReader, node: YamlNode) -> TokenRule | None:
    """Return the rows that a node describes; None, with the problems noted, if it describes none."""
    given = reader.mapping(node, "tokens", TOKENS)
    if not given.keys() >= {"name", "ids"}:
        return None
    names = reader.one_or_more(given["name"], "name", reader.pattern)
    adapter = reader.adapter(given["adapter"]) if "adapter" in given else None
    return TokenRule(names, _ids(reader, given["ids"]), adapter or "", reader.source.located(given["name"].span))


def _ids(reader: NodeReader, node: YamlNode) -> tuple[int, ...]:
    ranges = reader.several(node, "ids", functools.partial(_range, reader))
    if sum(map(len, ranges)) > MOST_IDS:
        hint = "train the whole embedding: `train:`"
        reader.problem(node.span, f"ids names more than {MOST_IDS:,} rows", hint)
        return ()
    counted = Counter(row for rows in ranges for row in rows)
    if twice := [str(row) for row, number in counted.items() if number > 1]:
        reader.problem(node.span, f"ids names a row twice: {listing(twice)}")
    return tuple(sorted(counted))


def _range(reader: NodeReader, node: YamlNode, what: str) -> range | None:
    value = node.value
    if isinstance(value, str):
        match = re.fullmatch(ROWS, value)
        first, end = map(int, match.groups()) if match else (0, 0)
        if first < end <= LARGEST_ID + 1:
            return range(first, end)
        reader.problem(
            node.span, f"'{shortened(value)}' is no range of rows", "write 32000..32010: the end is not in it"
        )
        return None
    number = reader.typed(node, what, {"type": "integer", "minimum": 0, "maximum": LARGEST_ID})
    return None if number is None else range(number, number + 1)
