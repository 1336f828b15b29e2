"""Rules given as a dict → the tree of nodes that a file has; positions are paths such as `rules[1].lora.r`."""

from collections.abc import Mapping
from typing import Any

from lora_fx.errors import SourceSpan
from lora_fx.rules.tree import MOST_DEPTH, MOST_DIGITS, MOST_NODES, SourceText, YamlNode, add_pair, size_of, text_node
from lora_fx.text import shortened

_TOO_LARGE = 10**MOST_DIGITS


def read_mapping(rules: Mapping[str, object], name: str) -> tuple[SourceText, YamlNode]:
    """Return the tree of rules given as a dict; positions are paths such as `rules[1].lora.r`."""
    source = SourceText(name)
    return source, _DictReader(source).node(rules, "", 0)


class _DictReader:
    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.count = 0

    def node(self, value: object, path: str, depth: int) -> YamlNode:
        self.count += size_of(value) if isinstance(value, str) else 1
        if depth > MOST_DEPTH:
            raise self.source.fail(SourceSpan(path=path), f"nested deeper than {MOST_DEPTH} levels")
        if self.count > MOST_NODES:
            what = f"has more than {MOST_NODES:,} entries, long texts counted as several"
            raise self.source.fail(SourceSpan(path=path), what)
        if isinstance(value, Mapping):
            return self._mapping(value, path, depth)
        if isinstance(value, (list, tuple)):
            items = [self.node(item, f"{path}[{position}]", depth + 1) for position, item in enumerate(value)]
            return YamlNode(path, items=items)
        return self._scalar(value, path)

    def _mapping(self, value: Mapping[Any, object], path: str, depth: int) -> YamlNode:
        node = YamlNode(path, pairs=[])
        seen: dict[str, YamlNode] = {}
        for key, item in value.items():
            key_node = self._scalar(key, path)
            name = shortened(str(key_node.value))
            key_node.where = f"{path}.{name}" if path else name
            add_pair(self.source, node, key_node, self.node(item, key_node.where, depth + 1), seen)
        return node

    def _scalar(self, value: object, path: str) -> YamlNode:
        if isinstance(value, str):
            return text_node(self.source, path, str(value))
        if isinstance(value, int) and abs(value) >= _TOO_LARGE:
            what = f"an integer of more than {MOST_DIGITS} digits cannot stand in rules"
            self.source.problem(SourceSpan(path=path), what)
            return YamlNode(path)
        for kind in (bool, int, float):
            if isinstance(value, kind):  # as its plain type: numpy's float64 is a float
                return YamlNode(path, value=kind(value))
        if value is not None:
            what = f"a value of type {type(value).__name__} cannot stand in rules"
            self.source.problem(SourceSpan(path=path), what)
        return YamlNode(path)
