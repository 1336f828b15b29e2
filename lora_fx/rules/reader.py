"""From a tree of nodes to a RuleSet; every problem is noted with its span, and all are raised at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fx.errors import Problem, RuleError, SourceSpan
from lora_fx.rules import shipped
from lora_fx.rules.globs import PatternError
from lora_fx.rules.keys import LORA, MATCH, MODULE_NAMES, OPS, RULE, TOP, is_adapter_name
from lora_fx.rules.nodes import NodeReader, number_hint
from lora_fx.rules.patterns import DIMENSION_FORMS, Dimension, ShapePattern, parse_dimension
from lora_fx.rules.ruleset import Expect, LoRAConfig, Match, Rule, RuleSet, TrainPattern
from lora_fx.rules.slices import read_slices
from lora_fx.rules.tree import SourceText, YamlNode, read_file, read_mapping
from lora_fx.text import nearest


def read_rules(rules: str | os.PathLike[str] | Mapping[str, object] | RuleSet) -> RuleSet:
    """Return the rules of a file, of a shipped file by its name, or of a dict; a RuleSet as it is.

    Raises:
        RuleError: with every problem found: line, column, what is wrong and what to do.
    """
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


class _RuleReader(NodeReader):
    """Reads the whole tree."""

    def __init__(self, source: SourceText, root: YamlNode) -> None:
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

    def _version(self, node: YamlNode) -> None:
        version = TOP.keys["version"].schema["const"]
        if type(node.value) is not int or node.value != version:
            self.problem(
                node.span, f"version must be {version}, found {node.kind}", f"this lora_fx reads version {version}"
            )

    def _train(self, node: YamlNode, what: str) -> TrainPattern | None:
        pattern = self.pattern(node, what)
        return None if pattern is None else TrainPattern(pattern, self._span(node))

    def _span(self, node: YamlNode) -> SourceSpan:
        return self.source.located(node.span)

    # -- rules

    def _rules(self, node: YamlNode, defaults: dict[str, Any]) -> tuple[Rule, ...]:
        if not node.items:
            problem = "is an empty list" if node.items is not None else f"must be a list, found {node.kind}"
            self.problem(node.span, f"rules {problem}")
            return ()
        rules = [self._rule(item, position, defaults) for position, item in enumerate(node.items, start=1)]
        self._unique_names(node.items, rules)
        return tuple(rule for rule in rules if rule is not None)

    def _unique_names(self, nodes: list[YamlNode], rules: list[Rule | None]) -> None:
        seen: dict[str, Rule] = {}
        for node, rule in zip(nodes, rules, strict=True):
            if rule is None:
                continue
            if rule.name in seen:
                where = f" (line {seen[rule.name].span.line})" if seen[rule.name].span.line else ""
                self.problem(_span_in(node, "name"), f"the rule name '{rule.name}' is taken{where}")
            seen.setdefault(rule.name, rule)

    def _rule(self, node: YamlNode, position: int, defaults: dict[str, Any]) -> Rule | None:
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
        per_call = "per_call" in found and bool(self.boolean(found["per_call"], "per_call"))
        span, pattern = self._span(node), self._span(_pattern_in(found["match"]))
        return Rule(name, match, config, skip, slices, expect, span, pattern, per_call)

    def _skip(self, node: YamlNode) -> str:
        if isinstance(node.value, bool):
            self.problem(node.span, "skip needs a reason", 'write why: skip: "tied to the token embedding"')
            return ""
        return self.text(node, "skip")

    def _no_use_with_skip(self, found: dict[str, YamlNode]) -> None:
        for key in ("lora", "slices", "per_call"):
            if key in found:
                self.problem(found[key].span, f"a rule that skips cannot have '{key}'", "take one of the two away")

    def _expect(self, node: YamlNode) -> Expect:
        if node.value == "any":
            return Expect(0, None)
        if isinstance(node.value, str):
            self.problem(node.span, f"expect must be an integer or any, found {node.kind}", number_hint(node))
            return Expect()
        number = self.integer(node, "expect", RULE.keys["expect"].schema["anyOf"][0]["minimum"])
        return Expect() if number is None else Expect(number, number)

    # -- match

    def _match(self, node: YamlNode, rule: str) -> Match:
        found = self.mapping(node, f"match of rule '{rule}'", MATCH)
        if node.pairs is not None and not node.pairs:
            self.problem(node.span, "match is empty", f"give at least one of {', '.join(MATCH.keys)}")
        return Match(
            name=self.one_or_more(found["name"], "name", self.pattern) if "name" in found else (),
            shape=self._shape(found["shape"]) if "shape" in found else None,
            op=self.one_or_more(found["op"], "op", self._op) if "op" in found else (),
            cls=self.one_or_more(found["class"], "class", self.pattern) if "class" in found else (),
        )

    def _op(self, node: YamlNode, what: str) -> str | None:
        return self.choice(node, what, OPS)

    def _shape(self, node: YamlNode) -> ShapePattern | None:
        dimensions = self.several(node, "shape", self._dimension)
        most = MATCH.keys["shape"].schema["maxItems"]
        if node.items is not None and len(node.items) > most:
            self.problem(node.span, f"shape has {len(node.items)} dimensions; a weight has at most {most}")
        return ShapePattern(dimensions) if dimensions else None

    def _dimension(self, node: YamlNode, what: str) -> Dimension | None:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            self.problem(node.span, f"a size in shape cannot be {node.kind}", f"forms: {DIMENSION_FORMS}")
            return None
        if isinstance(value, int) and value < 1:
            self.problem(node.span, f"a size in shape must be at least 1, found {value}")
            return None
        try:
            return parse_dimension(value)
        except PatternError as error:
            self.problem(node.span, str(error), f"forms: {DIMENSION_FORMS}")
            return None

    # -- lora

    def _lora(self, node: YamlNode, what: str, defaults: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a LoRAConfig on top of the defaults."""
        found = self.mapping(node, what if what == "defaults" else f"lora of {what}", LORA)
        values = {key: self._lora_value(value, key) for key, value in found.items()}
        return defaults | {key: value for key, value in values.items() if value is not None}

    def _lora_value(self, node: YamlNode, key: str) -> Any:
        return self._adapter(node) if key == "adapter" else self.typed(node, key, LORA.keys[key].schema)

    def _adapter(self, node: YamlNode) -> str | None:
        value = self.text(node, "adapter")
        if value in MODULE_NAMES:
            self.problem(node.span, f"adapter '{value}' cannot be so called: torch needs the name", "such as `style`")
        elif value and not is_adapter_name(value):
            problem = f"adapter '{value}' must be a name of letters, digits and _, a letter first"
            self.problem(node.span, problem, "such as `style`")
        return value


def _pattern_in(match: YamlNode) -> YamlNode:
    """Return what a match looks for: its name or else its first value; of a list the first."""
    values = {key.value: value for key, value in match.pairs or ()}
    found = values.get("name") or next(iter(values.values()), match)
    return found.items[0] if found.items else found


def _span_in(node: YamlNode, key: str) -> SourceSpan:
    """Return where a key's value stands in a mapping; the mapping's own span if the key is not there."""
    return next((value.span for each, value in node.pairs or () if each.value == key), node.span)
