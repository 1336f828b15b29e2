"""YAML text → a light tree of nodes with positions.

Built from PyYAML's events without recursion and without ever making an object of a tag.  Everything that YAML lets
through in silence and that a rule file cannot mean is an error here: duplicate keys, custom tags, several documents,
alias bombs, leading zeros.
"""

import codecs
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lora_fx.errors import Problem, RuleError, SourceSpan

MOST_BYTES = 1024 * 1024
MOST_DEPTH = 20
MOST_NODES = 100_000
Value = str | int | float | bool | None


@dataclass(slots=True)
class YamlNode:
    """A scalar, a list or a mapping, and where it was written."""

    span: SourceSpan
    value: Value = None
    items: "list[YamlNode] | None" = None
    pairs: "list[tuple[YamlNode, YamlNode]] | None" = None
    size: int = 1
    """Number of nodes in it, aliases counted each time."""
    quoted: bool = False

    @property
    def kind(self) -> str:
        """What it is, in words: `the string '8'`, `a list`."""
        if self.items is not None:
            return "a list"
        if self.pairs is not None:
            return "a mapping"
        if self.value is None:
            return "nothing"
        kind = {str: "string", bool: "boolean", int: "number", float: "number"}[type(self.value)]
        shown = repr(self.value).lower() if isinstance(self.value, bool) else repr(self.value)
        return f"the {kind} {shown if len(shown) <= 40 else shown[:37] + '…'}"


@dataclass(slots=True)
class SourceText:
    """The text that nodes come from, and the problems found in it."""

    name: str
    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, span: SourceSpan, message: str, hint: str = "") -> None:
        """Note something wrong after which reading goes on."""
        self.problems.append(Problem(message, self.located(span), hint))

    def fail(self, span: SourceSpan, message: str, hint: str = "") -> RuleError:
        """Return an error for a problem after which nothing more can be read."""
        self.problem(span, message, hint)
        return RuleError(self.name, self.problems)

    def raise_problems(self) -> None:
        """Raise a RuleError with all problems in the order of the file, if there are any."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: (problem.line, problem.column))
            raise RuleError(self.name, ordered)

    def located(self, span: SourceSpan) -> SourceSpan:
        """Return the span of a node with the name of the file and the whole line."""
        return replace(span, file=self.name, text=self.line(span))

    def line(self, span: SourceSpan) -> str:
        """Return the line in which a span is; nothing for rules given as a dict."""
        return self.lines[span.line - 1] if 0 < span.line <= len(self.lines) else ""


# -- files


def read_file(path: Path, name: str) -> tuple[SourceText, YamlNode]:
    """Return the tree of a file; RuleError if it cannot be read or is not a single YAML document."""
    source = SourceText(name)
    return source, _Builder(source).build(_decoded(_bytes_of(path, source), source))


def _bytes_of(path: Path, source: SourceText) -> bytes:
    try:
        if path.is_dir():
            raise source.fail(SourceSpan(), "is a directory, not a rule file")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise source.fail(SourceSpan(), f"has {size:,} bytes; a rule file has at most {MOST_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise source.fail(SourceSpan(), f"cannot be read: {why}") from error


def _decoded(content: bytes, source: SourceText) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise source.fail(SourceSpan(), "is UTF-16 text, not UTF-8", "save it as UTF-8")
    if b"\0" in content:
        raise source.fail(SourceSpan(), "is a binary file, not YAML text")
    content = content.removeprefix(codecs.BOM_UTF8)
    source.lines = _lines(content.decode("utf-8", "replace"))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        span = _end_of(content[: error.start].decode("utf-8"))
        raise source.fail(span, "is not UTF-8 text", "save it as UTF-8") from error
    if unreadable := _UNREADABLE.search(text):
        code = f"U+{ord(unreadable[0]):04X}"
        raise source.fail(_end_of(text[: unreadable.start()]), f"the character {code} cannot stand in YAML text")
    return text


def _lines(text: str) -> list[str]:
    return _UNREADABLE.sub("\N{REPLACEMENT CHARACTER}", text).splitlines()


def _end_of(text: str) -> SourceSpan:
    """Return the span of the character that follows the text."""
    lines = _lines(f"{text}.")
    return SourceSpan("", len(lines), len(lines[-1]))


# -- events to nodes

_UNREADABLE = yaml.reader.Reader.NON_PRINTABLE
_LOADER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_YAML_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {None, "!"} | {_YAML_TAG + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq")}


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not been seen."""

    node: YamlNode
    anchor: str | None
    key: YamlNode | None = None


class _Builder:
    """Builds the tree of one document, event by event."""

    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.open: list[_Open] = []
        self.anchors: dict[str, YamlNode] = {}
        self.root: YamlNode | None = None

    def build(self, text: str) -> YamlNode:
        try:
            for event in yaml.parse(text, Loader=_LOADER):
                self._take(event)
        except yaml.MarkedYAMLError as error:
            raise self._syntax_error(error) from error
        except yaml.YAMLError as error:
            raise self.source.fail(SourceSpan(), f"is not YAML: {error}") from error
        if self.root is None:
            raise self.source.fail(SourceSpan(), "is empty", "a rule file starts with `version: 1`")
        return self.root

    def _syntax_error(self, error: yaml.MarkedYAMLError) -> RuleError:
        problem, mark = error.problem or "", error.problem_mark
        if mark is None or "end of stream" in problem:  # where the quote or bracket opens says more
            mark = error.context_mark or mark
        span = SourceSpan() if mark is None else SourceSpan("", mark.line + 1, mark.column + 1)
        what = " ".join(filter(None, (problem, error.context)))
        hint = _hint_for(self.source.line(span), str(error))
        return self.source.fail(span, f"not valid YAML: {what}", hint)

    def _take(self, event: Any) -> None:
        if isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            raise self.source.fail(_span_of(event), "a second document starts here; a rule file holds one")
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag not in _PLAIN_TAGS:
            tag = str(event.tag)
            tag = f"!!{tag.removeprefix(_YAML_TAG)}" if tag.startswith(_YAML_TAG) else tag
            raise self.source.fail(_span_of(event), f"the tag {tag} is not allowed; rules are plain data")
        if isinstance(event, yaml.ScalarEvent):
            self._add(self._scalar(event), event.anchor)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._start(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            finished = self.open.pop()
            self._add(finished.node, finished.anchor)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)

    def _start(self, event: Any) -> None:
        if len(self.open) >= MOST_DEPTH:
            raise self.source.fail(_span_of(event), f"nested deeper than {MOST_DEPTH} levels")
        mapping = isinstance(event, yaml.MappingStartEvent)
        node = YamlNode(_span_of(event), pairs=[]) if mapping else YamlNode(_span_of(event), items=[])
        self.open.append(_Open(node, event.anchor))

    def _alias(self, event: Any) -> None:
        node = self.anchors.get(event.anchor)
        if node is None:
            hint = _hint_for(self.source.lines[event.start_mark.line], "alias")
            raise self.source.fail(_span_of(event), f"the alias *{event.anchor} is not defined", hint)
        self._add(node, None)

    def _add(self, node: YamlNode, anchor: str | None) -> None:
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        parent.node.size += node.size
        if parent.node.size > MOST_NODES:
            raise self.source.fail(node.span, f"has more than {MOST_NODES:,} entries, aliases counted each time")
        if parent.node.items is not None:
            parent.node.items.append(node)
        elif parent.key is None:
            parent.key = node
        else:
            _add_pair(self.source, parent.node, parent.key, node)
            parent.key = None

    def _scalar(self, event: Any) -> YamlNode:
        span = _span_of(event)
        if not event.implicit[0] or event.style not in (None, ""):
            return YamlNode(span, value=event.value, quoted=True)
        try:
            return YamlNode(span, value=_plain_value(event.value))
        except ValueError as error:
            self.source.problem(span, str(error), "write it without leading zeros, or quote it")
            return YamlNode(span, value=int(event.value))


def _span_of(event: Any) -> SourceSpan:
    start, end = event.start_mark, event.end_mark
    length = end.column - start.column if end.line == start.line else 1
    return SourceSpan("", start.line + 1, start.column + 1, max(1, length))


def _hint_for(line: str, problem: str) -> str:
    if "\t" in line and ("cannot start any token" in problem or "tab" in problem):
        return "a tab stands here; YAML is indented with spaces"
    if re.search(r"[:\-\[,]\s*\*", line):
        return 'a glob that starts with `*` must be quoted: name: "**.q_proj"'
    if "quoted scalar" in problem:
        return "the quotation mark that opens here is not closed"
    if "flow" in problem:
        return "close the bracket, or quote the text if it is one"
    if re.search(r":\s*[%@`]", line):
        return "quote the text if it is one"
    return ""


def _add_pair(source: SourceText, mapping: YamlNode, key: YamlNode, value: YamlNode) -> None:
    """Add a pair to a mapping; a key that is not a string or is there already is a problem."""
    assert mapping.pairs is not None
    if not isinstance(key.value, str) or key.items is not None or key.pairs is not None:
        source.problem(key.span, f"a key must be a string, found {key.kind}")
        return
    if key.value == "<<" and not key.quoted:
        source.problem(key.span, "merge keys (<<) are not supported", "put what rules share under `defaults:`")
        return
    earlier = next((known for known, _ in mapping.pairs if known.value == key.value), None)
    if earlier is not None:
        where = f", first in line {earlier.span.line}" if earlier.span.line else ""
        source.problem(key.span, f"the key '{key.value}' stands here twice{where}")
        return
    mapping.pairs.append((key, value))


# -- scalars, as YAML 1.2 reads them

_INTEGER = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")
_LEADING_ZERO = re.compile(r"[-+]?0\d+")
_SPECIAL: dict[str, Value] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".inf": math.inf, "-.inf": -math.inf, ".nan": math.nan, ".Inf": math.inf, ".NaN": math.nan, ".NAN": math.nan,
}  # fmt: skip


def _plain_value(text: str) -> Value:
    """Return the value of an unquoted scalar; ValueError for numbers with leading zeros.

    As YAML 1.2 and not 1.1: `on` and `yes` are strings, `1e-3` is a number.
    """
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError(f"{text} could be {int(text)} or the octal number {text}")
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= 18 else float(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


# -- dicts


def read_mapping(rules: Mapping[str, object], name: str) -> tuple[SourceText, YamlNode]:
    """Return the tree of rules given as a dict; positions are paths such as `rules[1].lora.r`."""
    source = SourceText(name)
    return source, _DictReader(source).node(rules, "", 0)


class _DictReader:
    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.count = 0

    def node(self, value: object, path: str, depth: int) -> YamlNode:
        span = SourceSpan(path=path)
        self.count += 1
        if depth > MOST_DEPTH:
            raise self.source.fail(span, f"nested deeper than {MOST_DEPTH} levels")
        if self.count > MOST_NODES:
            raise self.source.fail(span, f"has more than {MOST_NODES:,} entries")
        if isinstance(value, Mapping):
            return self._mapping(value, path, depth)
        if isinstance(value, (list, tuple)):
            items = [self.node(item, f"{path}[{position}]", depth + 1) for position, item in enumerate(value)]
            return YamlNode(span, items=items)
        return self._scalar(value, span)

    def _mapping(self, value: Mapping[Any, object], path: str, depth: int) -> YamlNode:
        node = YamlNode(SourceSpan(path=path), pairs=[])
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            key_node = self._scalar(key, SourceSpan(path=here))
            _add_pair(self.source, node, key_node, self.node(item, here, depth + 1))
        return node

    def _scalar(self, value: object, span: SourceSpan) -> YamlNode:
        for kind in (bool, int, float, str):
            if isinstance(value, kind):  # as its plain type: numpy's float64 is a float, an enum of strings a str
                return YamlNode(span, value=kind(value), quoted=kind is str)
        if value is not None:
            self.source.problem(span, f"a value of type {type(value).__name__} cannot stand in rules")
        return YamlNode(span)
