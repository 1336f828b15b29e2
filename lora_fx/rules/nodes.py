"""What all readers of nodes share: problems, keys, and values that are held to the schema of their key."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lora_fx.errors import SourceSpan
from lora_fx.rules.globs import PatternError
from lora_fx.rules.keys import Schema, Table
from lora_fx.rules.patterns import NamePattern
from lora_fx.rules.tree import SourceText, YamlNode
from lora_fx.text import nearest

T = TypeVar("T")
_BOUNDS = (
    ("minimum", "at least", operator.ge),
    ("exclusiveMinimum", "above", operator.gt),
    ("exclusiveMaximum", "below", operator.lt),
)


class NodeReader:
    """What all readers of nodes need: problems, keys, typed values."""

    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.problem = source.problem

    def mapping(self, node: YamlNode, what: str, table: Table) -> dict[str, YamlNode]:
        """Return the mapping's known keys; unknown and missing ones are problems."""
        if node.pairs is None:
            self.problem(node.span, f"{what} must be a mapping, found {node.kind}", f"allowed: {', '.join(table.keys)}")
            return {}
        values = {}
        for key, value in node.pairs:
            if key.value in table.keys:
                values[str(key.value)] = value
            else:
                self.problem(key.span, f"unknown key '{key.value}' in {what}", _key_hint(str(key.value), table))
        for name, known in table.keys.items():
            if known.required and name not in values:
                self.problem(node.span, f"{what} lacks '{name}'", f"add {known.example}")
        return values

    def text(self, node: YamlNode, what: str) -> str:
        """Return a non-empty string."""
        if not isinstance(node.value, str) or node.items is not None or node.pairs is not None:
            hint = "quote it" if isinstance(node.value, (int, float, bool)) else ""
            self.problem(node.span, f"{what} must be a string, found {node.kind}", hint)
            return ""
        if not node.value.strip():
            self.problem(node.span, f"{what} is empty")
        return node.value

    def typed(self, node: YamlNode, what: str, schema: Schema) -> Any:
        """Return a scalar of the type and within the bounds of a key's JSON Schema; None, and a problem, if it is not.

        A schema has `enum`, or `type` with `minimum`, `exclusiveMinimum` or `exclusiveMaximum`.
        """
        if "enum" in schema:
            return self._choice(node, what, schema["enum"])
        if schema["type"] != "boolean":
            return self._number(node, what, schema)
        if isinstance(node.value, bool):
            return node.value
        hint = "write true or false" if isinstance(node.value, str) else ""
        self.problem(node.span, f"{what} must be true or false, found {node.kind}", hint)
        return None

    def _number(self, node: YamlNode, what: str, schema: Schema) -> float | None:
        value, kind = node.value, "an integer" if schema["type"] == "integer" else "a number"
        if isinstance(value, bool) or not isinstance(value, int if kind == "an integer" else (int, float)):
            self.problem(node.span, f"{what} must be {kind}, found {node.kind}", number_hint(node))
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self.problem(node.span, f"{what} must be finite, found {value}")
            return None
        bounds = [(words, schema[key], holds) for key, words, holds in _BOUNDS if key in schema]
        if all(holds(value, bound) for _, bound, holds in bounds):
            return value
        allowed = " and ".join(f"{words} {bound}" for words, bound, _ in bounds)
        self.problem(node.span, f"{what} must be {allowed}, found {value}")
        return None

    def _choice(self, node: YamlNode, what: str, allowed: Sequence[str]) -> str | None:
        value = self.text(node, what)
        if not value or value in allowed:
            return value or None
        hint = f"{did_you_mean(value, allowed)}allowed: {', '.join(allowed)}"
        self.problem(node.span, f"{what} '{value}' is unknown", hint)
        return None

    def one_or_more(self, node: YamlNode, what: str, read: Callable[[YamlNode, str], T | None]) -> tuple[T, ...]:
        """Return what one value or a non-empty list of values stands for."""
        if node.items is None:
            value = read(node, what)
            return () if value is None else (value,)
        return self.several(node, what, read)

    def several(self, node: YamlNode, what: str, read: Callable[[YamlNode, str], T | None]) -> tuple[T, ...]:
        """Return what the items of a non-empty list stand for."""
        if node.items is None:
            self.problem(node.span, f"{what} must be a list, found {node.kind}")
            return ()
        if not node.items:
            self.problem(node.span, f"{what} is an empty list")
        values = [read(item, what) for item in node.items]
        return tuple(value for value in values if value is not None)

    def pattern(self, node: YamlNode, what: str) -> NamePattern | None:
        """Return the pattern that a string is."""
        value = self.text(node, what)
        if not value.strip():
            return None
        try:
            return NamePattern(value)
        except PatternError as error:
            self.problem(_within(node, error), f"{what} '{value}': {error}")
            return None


def _within(node: YamlNode, error: PatternError) -> SourceSpan:
    """Return the span of a pattern's problem inside its text, where the text stands as it is written."""
    span = node.span
    if not span.line or span.length != len(str(node.value)) + 2 * node.quoted:
        return span
    return replace(span, column=span.column + node.quoted + error.offset, length=error.length)


def _key_hint(key: str, table: Table) -> str:
    allowed = f"allowed: {', '.join(table.keys)}"
    if key in table.foreign:
        return f"here it is called '{table.foreign[key]}'.  {allowed}"
    return did_you_mean(key, table.keys) + allowed


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the known word that looks most like this one as the beginning of a hint; "" if none does."""
    return "".join(f"did you mean '{similar}'?  " for similar in nearest(word, known, most=1))


def number_hint(node: YamlNode) -> str:
    """Return what to do about a number in quotes; "" for anything else."""
    if not isinstance(node.value, str):
        return ""
    try:
        float(node.value)
    except ValueError:
        return ""
    return "take the quotes away"
