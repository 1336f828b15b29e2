"""What all readers of nodes share: problems, keys, and values that are held to the schema of their key."""

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lora_fx.errors import SourceSpan
from lora_fx.rules.automaton import MOST_STATES
from lora_fx.rules.globs import PatternError
from lora_fx.rules.keys import Schema, Table, is_adapter_name
from lora_fx.rules.patterns import EXPRESSION_PREFIX, NamePattern
from lora_fx.rules.tree import SourceText, YamlNode
from lora_fx.text import nearest, shortened

T = TypeVar("T")
MOST_STATES_TOGETHER = 6 * MOST_STATES
"""Of all patterns of one file, each counted with at least its length."""
_LONGEST_WORD, _MOST_COMPARED = 100, 20
_LIKE_EXPRESSION = re.compile(r"\.[*+]|[()|^$\\]")
"""What is in regular expressions, and in no glob that is wrong for another reason."""
_BOUNDS = (
    ("minimum", "at least", operator.ge),
    ("exclusiveMinimum", "above", operator.gt),
    ("exclusiveMaximum", "below", operator.lt),
    ("maximum", "at most", operator.le),
)


class NodeReader:
    """What all readers of nodes need: problems, keys, typed values."""

    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.problem = source.problem
        self._states = 0
        """Of all patterns so far."""

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
                name = str(key.value)
                hint = functools.partial(_key_hint, name, table)
                self.problem(key.span, f"unknown key '{shortened(name)}' in {what}", hint)
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
        if node.value.isspace() or not node.value:
            self.problem(node.span, f"{what} is empty")
        return node.value

    def typed(self, node: YamlNode, what: str, schema: Schema) -> Any:
        """Return a scalar of the type and within the bounds of a key's JSON Schema; None, and a problem, if it is not.

        A schema has `enum`, or `type` with `minimum`, `exclusiveMinimum`, `exclusiveMaximum` or `maximum`.
        """
        if "enum" in schema:
            return self.choice(node, what, schema["enum"])
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
        too_large = [(words, bound, holds) for words, bound, holds in bounds if holds is operator.le and value > bound]
        told = too_large or [bound for bound in bounds if bound[2] is not operator.le]
        allowed = " and ".join(f"{words} {bound}" for words, bound, _ in told)
        self.problem(node.span, f"{what} must be {allowed}, found {value}")
        return None

    def adapter(self, node: YamlNode) -> str | None:
        """Return the name of an adapter."""
        value = self.text(node, "adapter")
        if value and not is_adapter_name(value):
            problem = f"adapter '{shortened(value)}' must be a name of letters, digits and _, a letter first"
            self.problem(node.span, problem, "such as `style`")
        return value

    def choice(self, node: YamlNode, what: str, allowed: Sequence[str]) -> str | None:
        """Return a string that is one of those allowed."""
        value = self.text(node, what)
        if not value or value in allowed:
            return value or None
        self.problem(
            node.span,
            f"{what} '{shortened(value)}' is unknown",
            lambda: f"{did_you_mean(value, allowed)}allowed: {', '.join(allowed)}",
        )
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
        if not value or value.isspace() or self._states > MOST_STATES_TOGETHER:
            return None
        self._states += len(value)
        try:
            pattern = NamePattern(value)
            self._states += pattern.states - len(value)
            if self._states > MOST_STATES_TOGETHER:
                self.problem(node.span, f"the patterns need more than {MOST_STATES_TOGETHER:,} states together")
            return pattern
        except PatternError as error:
            meant = not value.startswith(EXPRESSION_PREFIX) and _LIKE_EXPRESSION.search(value) is not None
            hint = f"names are globs; before a regular expression write {EXPRESSION_PREFIX}" if meant else ""
            self.problem(_within(node, error), f"{what} '{shortened(value)}': {error}", hint)
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
    similar = nearest(word[:_LONGEST_WORD], itertools.islice(known, _MOST_COMPARED), most=1)
    return "".join(f"did you mean '{word}'?  " for word in similar)


def number_hint(node: YamlNode) -> str:
    """Return what to do about a number in quotes; "" for anything else."""
    if not isinstance(node.value, str):
        return ""
    try:
        float(node.value)
    except ValueError:
        return ""
    return "take the quotes away"
