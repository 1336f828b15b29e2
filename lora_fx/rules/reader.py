"""From a tree of nodes to a RuleSet; every problem is noted with its span, and all are raised at once."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from lora_fx.errors import Problem, RuleError
from lora_fx.rules import keys, shipped
from lora_fx.rules.dicts import read_mapping
from lora_fx.rules.globs import PatternError
from lora_fx.rules.inits import INITS, is_init
from lora_fx.rules.nodes import NodeReader, number_hint
from lora_fx.rules.patterns import DIMENSION_FORMS, Dimension, ShapePattern, parse_dimension
from lora_fx.rules.ruleset import Expect, LoRAConfig, Match, Rule, RuleSet, TokenRule, TrainPattern
from lora_fx.rules.slices import read_slices
from lora_fx.rules.tokens import read_tokens
from lora_fx.rules.tree import YamlNode, read_file
from lora_fx.text import nearest, shortened

_OF_PEFT = "lora_fx.rules_from_peft(config, model) makes rules of it"


def read_rules(rules: str | os.PathLike[str] | Mapping[str, object] | RuleSet) -> RuleSet:
    """Return the rules of a file, of a shipped file by its name, or of a dict; a RuleSet as it is.

    Raises:
        RuleError: with every problem found: line, column, what is wrong and what to do.
    """
    if isinstance(rules, RuleSet):
        return rules
    if isinstance(rules, Mapping):
        source, root = read_mapping({"version": 1, **rules}, "rules")  # only files need to say it
        return _RuleReader(source).read(root)
    if not isinstance(rules, (str, os.PathLike)):
        what = f"rules must be a path, a shipped name, a dict or a RuleSet, not {type(rules).__name__}"
        hint = _OF_PEFT if type(rules).__module__.startswith("peft.") else ""
        raise RuleError("rules", [Problem(what, hint=hint)])
    name = os.fsdecode(rules)
    if not name or "\n" in name:
        what = "the path of the rules is empty" if not name else "this is the text of rules, not the path of a file"
        raise RuleError("rules", [Problem(what, hint="give the path, or the parsed text: yaml.safe_load(text)")])
    path = shipped.find(name)
    if not os.path.lexists(path):
        raise _missing(name, path)
    if path.name == "adapter_config.json":
        hint = f"lora_fx.rules_from_peft({name!r}, model) makes rules of it"
        raise RuleError(name, [Problem("this is the configuration of an adapter of PEFT's", hint=hint)])
    source, root = read_file(path, name)
    return _RuleReader(source).read(root)


def read_stream(stream: IO[bytes], name: str) -> RuleSet:
    """Return the rules of an open file that messages call by a name.

    Raises:
        RuleError: as `read_rules`.
    """
    source, root = read_file(stream, name)
    return _RuleReader(source).read(root)


def _missing(name: str, path: Path) -> RuleError:
    folder = path.parent if os.path.isdir(path.parent) else Path(".")
    beside = [str(file) for suffix in ("yaml", "yml") for file in sorted(folder.glob(f"*.{suffix}"))]
    similar = nearest(name, [*beside, *shipped.names()])
    known = f"shipped: {', '.join(shipped.names())}"
    hint = f"did you mean {' or '.join(similar)}?  {known}" if similar else known
    return RuleError(name, [Problem("no such file", hint=hint)])


class _RuleReader(NodeReader):
    """Reads the whole tree."""

    def read(self, root: YamlNode) -> RuleSet:
        """Return the rules of a tree; RuleError with all its problems."""
        given = self.mapping(root, "the rule file", keys.TOP)
        if "version" in given:
            self._version(given["version"])
        biases = self._biases(given["bias"]) if "bias" in given else "none"
        shared: dict[str, Any] = {} if biases == "none" else {"bias": True}
        defaults = self._lora(given["defaults"], "defaults", shared) if "defaults" in given else shared
        rules = self._rules(given["rules"], defaults) if "rules" in given else ()
        train = self.several(given["train"], "train", self._train) if "train" in given else ()
        tokens = self.several(given["tokens"], "tokens", self._tokens) if "tokens" in given else ()
        if biases == "all" and any(rule.lora is not None and not rule.lora.bias for rule in rules):
            self.problem(given["bias"].span, "bias: all contradicts a `bias: false`", "take one of the two away")
        self._invoked(rules, {key: given[key] for key in ("train", "tokens") if key in given})
        self.source.raise_problems()
        return RuleSet(rules, train, self.source.name, tokens, biases == "all")

    def _biases(self, node: YamlNode) -> str:
        return self.choice(node, "bias", keys.BIASES) or "none"

    def _tokens(self, node: YamlNode, _what: str) -> TokenRule | None:
        return read_tokens(self, node)

    def _invoked(self, rules: tuple[Rule, ...], whole: Mapping[str, YamlNode]) -> None:
        """Note what an adapter with an invocation cannot have: the base alone must act before it, at every site."""
        loras = [(rule.span, rule.per_call, rule.lora) for rule in rules if rule.lora is not None]
        first: dict[str, tuple[int, ...]] = {}
        for span, per_call, lora in loras:
            if first.setdefault(lora.adapter, lora.invocation) != lora.invocation:
                what = f"adapter '{lora.adapter}' has another invocation here than in a rule before"
                self.problem(span, what, "an adapter has one; write it under `defaults`, or name two adapters")
            held = {"dora": lora.dora, "bias": lora.bias, "per_call": per_call} if lora.invocation else {}
            for key in (key for key, is_there in held.items() if is_there):
                self.problem(span, f"an adapter with an invocation cannot have '{key}'", f"leave out '{key}'")
        for key, node in whole.items() if any(first.values()) else ():
            what = f"what is trained by `{key}:` acts on every token, and the base alone shall before an invocation"
            self.problem(node.span, what, f"leave out `{key}:`, or `invocation`")

    def _version(self, node: YamlNode) -> None:
        version = keys.TOP.keys["version"].schema["const"]
        if type(node.value) is not int or node.value != version:
            hint = f"this lora_fx reads version {version}"
            self.problem(node.span, f"version must be {version}, found {node.kind}", hint)

    def _train(self, node: YamlNode, what: str) -> TrainPattern | None:
        pattern = self.pattern(node, what)
        return None if pattern is None else TrainPattern(pattern, self.source.located(node.span))

    # -- rules

    def _rules(self, node: YamlNode, defaults: dict[str, Any]) -> tuple[Rule, ...]:
        nodes = self.several(node, "rules", lambda item, _: item)
        rules = [self._rule(item, position, defaults) for position, item in enumerate(nodes, start=1)]
        named: dict[str, Rule] = {}
        for item, rule in zip(nodes, rules, strict=True):
            if rule is not None and named.setdefault(rule.name, rule) is not rule:
                line = named[rule.name].span.line
                taken = f"the rule name '{shortened(rule.name)}' is taken{f' (line {line})' if line else ''}"
                own = next((value for key, value in item.pairs or () if key.value == "name"), item)
                self.problem(own.span, taken)
        return tuple(rule for rule in rules if rule is not None)

    def _rule(self, node: YamlNode, position: int, defaults: dict[str, Any]) -> Rule | None:
        given = self.mapping(node, "a rule", keys.RULE)
        name = self.text(given["name"], "name") if "name" in given else f"rule {position}"
        what = f"rule '{shortened(name)}'"
        match = self._match(given["match"], what) if "match" in given else None
        skip = self._skip(given) if "skip" in given else None
        lora = self._lora(given["lora"], what, defaults) if "lora" in given else defaults
        slices = read_slices(self, given["slices"]) if "slices" in given else None
        expect = self._expect(given["expect"]) if "expect" in given else Expect()
        if match is None:
            return None
        config = None if "skip" in given else LoRAConfig(**lora)
        per_call = "per_call" in given and bool(self.typed(given["per_call"], "per_call", keys.FLAG))
        span, pattern = (self.source.located(part.span) for part in (node, _pattern_in(given["match"])))
        return Rule(name, match, config, skip, slices, expect, span, pattern, per_call)

    def _skip(self, given: dict[str, YamlNode]) -> str:
        reason = ""
        if isinstance(given["skip"].value, bool):
            hint = 'write why: skip: "tied to the token embedding"'
            self.problem(given["skip"].span, "skip needs a reason", hint)
        else:
            reason = self.text(given["skip"], "skip")
        for key in keys.NOT_WITH_SKIP:
            if key in given:
                self.problem(given[key].span, f"a rule that skips cannot have '{key}'", "take one of the two away")
        return reason

    def _expect(self, node: YamlNode) -> Expect:
        if node.value == "any":
            return Expect(0, None)
        if isinstance(node.value, str):
            self.problem(node.span, f"expect must be an integer or any, found {node.kind}", number_hint(node))
            return Expect()
        number = self.typed(node, "expect", keys.COUNT)
        return Expect() if number is None else Expect(number, number)

    # -- match

    def _match(self, node: YamlNode, rule: str) -> Match:
        given = self.mapping(node, f"match of {rule}", keys.MATCH)
        if node.pairs is not None and not node.pairs:
            self.problem(node.span, "match is empty", f"give at least one of {', '.join(keys.MATCH.keys)}")
        operation = functools.partial(self.typed, schema=keys.OP)
        return Match(
            name=self.one_or_more(given["name"], "name", self.pattern) if "name" in given else (),
            shape=self._shape(given["shape"]) if "shape" in given else None,
            op=self.one_or_more(given["op"], "op", operation) if "op" in given else (),
            cls=self.one_or_more(given["class"], "class", self.pattern) if "class" in given else (),
        )

    def _shape(self, node: YamlNode) -> ShapePattern | None:
        dimensions = self.several(node, "shape", self._dimension)
        if node.items is not None and len(node.items) > keys.MOST_DIMENSIONS:
            self.problem(
                node.span, f"shape has {len(node.items)} dimensions; a weight has at most {keys.MOST_DIMENSIONS}"
            )
        return ShapePattern(dimensions) if dimensions else None

    def _dimension(self, node: YamlNode, what: str) -> Dimension | None:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            self.problem(node.span, f"a size in shape cannot be {node.kind}", f"forms: {DIMENSION_FORMS}")
            return None
        if isinstance(value, int) and self.typed(node, "a size in shape", keys.POSITIVE) is None:
            return None
        try:
            return parse_dimension(value)
        except PatternError as error:
            self.problem(node.span, str(error), f"forms: {DIMENSION_FORMS}")
            return None

    # -- lora

    def _lora(self, node: YamlNode, what: str, defaults: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a LoRAConfig on top of the defaults."""
        given = self.mapping(node, what if what == "defaults" else f"lora of {what}", keys.LORA)
        own: dict[str, Callable[[YamlNode], object]] = {
            "adapter": self.adapter,
            "init": self._init,
            "divide_r": self._divisor,
            "invocation": self._invocation,
        }
        values = {
            key: own[key](value) if key in own else self.typed(value, key, keys.LORA.keys[key].schema)
            for key, value in given.items()
        }
        return defaults | {key: value for key, value in values.items() if value is not None}

    def _divisor(self, node: YamlNode) -> int | None:
        """Return by what r is divided; 0 for the number of experts."""
        if isinstance(node.value, str):
            return None if self.choice(node, "divide_r", (keys.BY_EXPERTS,)) is None else 0
        number: int | None = self.typed(node, "divide_r", keys.RANK)
        return number

    def _invocation(self, node: YamlNode) -> tuple[int, ...]:
        return self.several(node, "invocation", lambda item, what: self.typed(item, f"a token of {what}", keys.TOKEN))

    def _init(self, node: YamlNode) -> str | None:
        return str(node.value) if is_init(node.value) else self.choice(node, "init", (*INITS, "pissa_niter_4"))


def _pattern_in(match: YamlNode) -> YamlNode:
    """Return what a match looks for: its name or else its first value; of a list the first."""
    values = {key.value: value for key, value in match.pairs or ()}
    pattern = values.get("name") or next(iter(values.values()), match)
    return pattern.items[0] if pattern.items else pattern
