"""From a tree of nodes to a RuleSet; every problem is noted with its place, and all are raised at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_fx.errors import Problem, RuleError
from lora_fx.rules import shipped
from lora_fx.rules.globs import PatternError
from lora_fx.rules.keys import INITS, LORA, MATCH, MODULE_NAMES, OPS, RULE, TOP, Table, is_adapter_name
from lora_fx.rules.patterns import DIMENSION_FORMS, Dimension, NamePattern, ShapePattern, parse_dimension
from lora_fx.rules.ruleset import Expect, LoRAConfig, Match, Rule, RuleSet, SourceSpan, TrainPattern
from lora_fx.rules.slices import read_slices
from lora_fx.rules.tree import Node, Place, Source, read_file, read_mapping
from lora_fx.text import nearest

T = TypeVar("T")


def read_any(rules: str | os.PathLike[str] | Mapping[str, object] | RuleSet) -> RuleSet:
    """Return the rules that any of the accepted forms means."""
    if isinstance(rules, RuleSet):
        return rules
    if isinstance(rules, Mapping):
        return _RuleReader(*read_mapping(rules, "rules")).read()
    if not isinstance(rules, (str, os.PathLike)):
        kind = type(rules).__name__
        raise RuleError("rules", [Problem(f"rules must be a path, a shipped name, a dict or a RuleSet, not {kind}")])
    name = os.fspath(rules)
    if not name or "\n" in name:
        what = "the path of the rules is empty" if not name else "this is the text of rules, not the path of a file"
        raise RuleError("rules", [Problem(what, hint="give the path, or the parsed text: yaml.safe_load(text)")])
    path = shipped.find(name)
    if not path.exists():
        raise _missing(name, path)
    return read_from(path, name)


def read_from(path: Path, name: str) -> RuleSet:
    """Return the rules of a file that messages call by a name."""
    return _RuleReader(*read_file(path, name)).read()


def _missing(name: str, path: Path) -> RuleError:
    folder = path.parent if path.parent.is_dir() else Path(".")
    beside = [str(each) for pattern in ("*.yaml", "*.yml") for each in sorted(folder.glob(pattern))]
    similar = nearest(name, [*beside, *shipped.names()])
    known = f"shipped: {', '.join(shipped.names())}"
    hint = f"did you mean {' or '.join(similar)}?  {known}" if similar else known
    return RuleError(name, [Problem("no such file", hint=hint)])


class Reading:
    """What all readers of nodes need: problems, keys, typed values."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def problem(self, place: Place, message: str, hint: str = "") -> None:
        self.source.problem(place, message, hint)

    def mapping(self, node: Node, what: str, table: Table) -> dict[str, Node]:
        """Return the mapping's known keys; unknown and missing ones are problems."""
        if node.pairs is None:
            self.problem(
                node.place, f"{what} must be a mapping, found {node.kind}", f"allowed: {', '.join(table.keys)}"
            )
            return {}
        found = {}
        for key, value in node.pairs:
            if key.value in table.keys:
                found[str(key.value)] = value
            else:
                self.problem(key.place, f"unknown key '{key.value}' in {what}", _key_hint(str(key.value), table))
        for name, each in table.keys.items():
            if each.required and not any(key.value == name for key, _ in node.pairs):
                self.problem(node.place, f"{what} lacks '{name}'", f"add {each.example}")
        return found

    def text(self, node: Node, what: str) -> str:
        """Return a non-empty string."""
        if not isinstance(node.value, str) or node.items is not None or node.pairs is not None:
            hint = "quote it" if isinstance(node.value, (int, float, bool)) else ""
            self.problem(node.place, f"{what} must be a string, found {node.kind}", hint)
            return ""
        if not node.value.strip():
            self.problem(node.place, f"{what} is empty")
        return node.value

    def integer(self, node: Node, what: str, least: int) -> int | None:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(node.place, f"{what} must be an integer, found {node.kind}", _number_hint(node))
            return None
        if value < least:
            self.problem(node.place, f"{what} must be at least {least}, found {value}")
            return None
        return value

    def number(self, node: Node, what: str) -> float | None:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.problem(node.place, f"{what} must be a number, found {node.kind}", _number_hint(node))
            return None
        if not math.isfinite(value):
            self.problem(node.place, f"{what} must be finite, found {value}")
            return None
        return value

    def boolean(self, node: Node, what: str) -> bool | None:
        if isinstance(node.value, bool):
            return node.value
        hint = "write true or false" if isinstance(node.value, str) else ""
        self.problem(node.place, f"{what} must be true or false, found {node.kind}", hint)
        return None

    def choice(self, node: Node, what: str, allowed: tuple[str, ...]) -> str | None:
        value = self.text(node, what)
        if not value or value in allowed:
            return value or None
        similar = nearest(value, allowed, most=1)
        guess = f"did you mean '{similar[0]}'?  " if similar else ""
        self.problem(node.place, f"{what} '{value}' is unknown", f"{guess}allowed: {', '.join(allowed)}")
        return None

    def one_or_more(self, node: Node, what: str, read: Callable[[Node, str], T | None]) -> tuple[T, ...]:
        """Return what one value or a non-empty list of values stands for."""
        if node.items is None:
            value = read(node, what)
            return () if value is None else (value,)
        return self.several(node, what, read)

    def several(self, node: Node, what: str, read: Callable[[Node, str], T | None]) -> tuple[T, ...]:
        if node.items is None:
            self.problem(node.place, f"{what} must be a list, found {node.kind}")
            return ()
        if not node.items:
            self.problem(node.place, f"{what} is an empty list")
        values = [read(item, what) for item in node.items]
        return tuple(value for value in values if value is not None)

    def pattern(self, node: Node, what: str) -> NamePattern | None:
        value = self.text(node, what)
        if not value.strip():
            return None
        try:
            return NamePattern(value)
        except PatternError as error:
            self.problem(_within(node, error), f"{what} '{value}': {error}")
            return None


def _within(node: Node, error: PatternError) -> Place:
    """Return the place of a pattern's problem inside its text, where the text stands as it is written."""
    place = node.place
    quotes = 1 if node.quoted else 0
    text = str(node.value)
    if not place.line or place.length != len(text) + 2 * quotes:
        return place
    return Place(place.line, place.column + quotes + error.offset, error.length)


def _key_hint(key: str, table: Table) -> str:
    allowed = f"allowed: {', '.join(table.keys)}"
    if key in table.foreign:
        return f"here it is called '{table.foreign[key]}'.  {allowed}"
    similar = nearest(key, table.keys, most=1)
    return f"did you mean '{similar[0]}'?  {allowed}" if similar else allowed


def _number_hint(node: Node) -> str:
    if not isinstance(node.value, str):
        return ""
    try:
        float(node.value)
    except ValueError:
        return ""
    return "take the quotes away"


class _RuleReader(Reading):
    """Reads the whole tree."""

    def __init__(self, source: Source, root: Node) -> None:
        super().__init__(source)
        self.root = root

    def read(self) -> RuleSet:
        found = self.mapping(self.root, "the rule file", TOP)
        if "version" in found:
            self._version(found["version"])
        defaults = self._lora(found["defaults"], "defaults", {}) if "defaults" in found else {}
        rules = self._rules(found["rules"], defaults) if "rules" in found else ()
        train = self.several(found["train"], "train", self._train) if "train" in found else ()
        self.source.raise_problems()
        return RuleSet(rules, train, self.source.name)

    def _version(self, node: Node) -> None:
        if node.value is True or node.value != 1 or isinstance(node.value, float):
            self.problem(node.place, f"version must be 1, found {node.kind}", "this lora_fx reads version 1")

    def _train(self, node: Node, what: str) -> TrainPattern | None:
        pattern = self.pattern(node, what)
        return None if pattern is None else TrainPattern(pattern, self._span(node))

    def _span(self, node: Node) -> SourceSpan:
        place = node.place
        return SourceSpan(self.source.name, place.line, place.column, place.length, self.source.line(place))

    # -- rules

    def _rules(self, node: Node, defaults: dict[str, Any]) -> tuple[Rule, ...]:
        if not node.items:
            problem = "is an empty list" if node.items is not None else f"must be a list, found {node.kind}"
            self.problem(node.place, f"rules {problem}")
            return ()
        rules = [self._rule(item, position, defaults) for position, item in enumerate(node.items, start=1)]
        self._unique_names(node.items, rules)
        return tuple(rule for rule in rules if rule is not None)

    def _unique_names(self, nodes: list[Node], rules: list[Rule | None]) -> None:
        seen: dict[str, Rule] = {}
        for node, rule in zip(nodes, rules, strict=True):
            if rule is None:
                continue
            if rule.name in seen:
                where = f" (line {seen[rule.name].span.line})" if seen[rule.name].span.line else ""
                self.problem(_place_of(node, "name"), f"the rule name '{rule.name}' is taken{where}")
            seen.setdefault(rule.name, rule)

    def _rule(self, node: Node, position: int, defaults: dict[str, Any]) -> Rule | None:
        found = self.mapping(node, "a rule", RULE)
        name = self.text(found["name"], "name") if "name" in found else f"rule {position}"
        match = self._match(found["match"], name) if "match" in found else None
        skip = self._skip(found["skip"]) if "skip" in found else None
        if "skip" in found:
            self._no_use_with_skip(found)
        lora = self._lora(found["lora"], f"rule '{name}'", defaults) if "lora" in found else defaults
        slices = read_slices(self, found["slices"]) if "slices" in found else None
        expect = self._expect(found["expect"]) if "expect" in found else Expect()
        if match is None:
            return None
        config = None if "skip" in found else LoRAConfig(**lora)
        per_call = bool(self.boolean(found["per_call"], "per_call")) if "per_call" in found else False
        place, pattern = self._span(node), self._span(_pattern_in(found["match"]))
        return Rule(name, match, config, skip, slices, expect, place, pattern, per_call)

    def _skip(self, node: Node) -> str:
        if isinstance(node.value, bool):
            self.problem(node.place, "skip needs a reason", 'write why: skip: "tied to the token embedding"')
            return ""
        return self.text(node, "skip")

    def _no_use_with_skip(self, found: dict[str, Node]) -> None:
        for key in ("lora", "slices", "per_call"):
            if key in found:
                self.problem(found[key].place, f"a rule that skips cannot have '{key}'", "take one of the two away")

    def _expect(self, node: Node) -> Expect:
        if node.value == "any":
            return Expect(0, None)
        if isinstance(node.value, str):
            self.problem(node.place, f"expect must be an integer or any, found {node.kind}", _number_hint(node))
            return Expect()
        number = self.integer(node, "expect", 0)
        return Expect() if number is None else Expect(number, number)

    # -- match

    def _match(self, node: Node, rule: str) -> Match:
        found = self.mapping(node, f"match of rule '{rule}'", MATCH)
        if node.pairs is not None and not node.pairs:
            self.problem(node.place, "match is empty", f"give at least one of {', '.join(MATCH.keys)}")
        return Match(
            name=self.one_or_more(found["name"], "name", self.pattern) if "name" in found else (),
            shape=self._shape(found["shape"]) if "shape" in found else None,
            op=self.one_or_more(found["op"], "op", self._op) if "op" in found else (),
            cls=self.one_or_more(found["class"], "class", self.pattern) if "class" in found else (),
        )

    def _op(self, node: Node, what: str) -> str | None:
        return self.choice(node, what, OPS)

    def _shape(self, node: Node) -> ShapePattern | None:
        dimensions = self.several(node, "shape", self._dimension)
        if node.items is not None and len(node.items) > 5:
            self.problem(node.place, f"shape has {len(node.items)} dimensions; a weight has at most 5")
        return ShapePattern(dimensions) if dimensions else None

    def _dimension(self, node: Node, what: str) -> Dimension | None:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            self.problem(node.place, f"a size in shape cannot be {node.kind}", f"forms: {DIMENSION_FORMS}")
            return None
        if isinstance(value, int) and value < 1:
            self.problem(node.place, f"a size in shape must be at least 1, found {value}")
            return None
        try:
            return parse_dimension(value)
        except PatternError as error:
            self.problem(node.place, str(error), f"forms: {DIMENSION_FORMS}")
            return None

    # -- lora

    def _lora(self, node: Node, what: str, defaults: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a LoRAConfig on top of the defaults."""
        found = self.mapping(node, what if what == "defaults" else f"lora of {what}", LORA)
        values = {key: _LORA_READERS[key](self, value) for key, value in found.items()}
        return defaults | {key: value for key, value in values.items() if value is not None}

    def rank(self, node: Node) -> int | None:
        return self.integer(node, "r", 1)

    def alpha(self, node: Node) -> float | None:
        value = self.number(node, "alpha")
        if value is not None and value <= 0:
            self.problem(node.place, f"alpha must be above 0, found {value}")
        return value

    def dropout(self, node: Node) -> float | None:
        value = self.number(node, "dropout")
        if value is not None and not 0 <= value < 1:
            self.problem(node.place, f"dropout must be at least 0 and below 1, found {value}")
        return value

    def init(self, node: Node) -> str | None:
        return self.choice(node, "init", INITS)

    def adapter(self, node: Node) -> str | None:
        value = self.text(node, "adapter")
        if value in MODULE_NAMES:
            self.problem(node.place, f"adapter '{value}' cannot be so called: torch needs the name", "such as `style`")
        elif value and not is_adapter_name(value):
            problem = f"adapter '{value}' must be a name of letters, digits and _, a letter first"
            self.problem(node.place, problem, "such as `style`")
        return value


_LORA_READERS: dict[str, Callable[[_RuleReader, Node], Any]] = {
    "r": _RuleReader.rank,
    "alpha": _RuleReader.alpha,
    "dropout": _RuleReader.dropout,
    "init": _RuleReader.init,
    "rslora": lambda reader, node: reader.boolean(node, "rslora"),
    "dora": lambda reader, node: reader.boolean(node, "dora"),
    "bias": lambda reader, node: reader.boolean(node, "bias"),
    "share_dropout": lambda reader, node: reader.boolean(node, "share_dropout"),
    "adapter": _RuleReader.adapter,
}


def _pattern_in(match: Node) -> Node:
    """Return what a match looks for: its name or else its first value; of a list the first."""
    values = {key.value: value for key, value in match.pairs or ()}
    found = values.get("name") or next(iter(values.values()), match)
    return found.items[0] if found.items else found


def _place_of(node: Node, key: str) -> Place:
    """Return where a key's value stands in a mapping; the mapping's own place if the key is not there."""
    return next((value.place for each, value in node.pairs or () if each.value == key), node.place)
