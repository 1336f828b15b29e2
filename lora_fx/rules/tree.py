"""YAML text → a light tree of nodes with positions.

Built from PyYAML's events without recursion and without ever making an object of a tag.  Everything that YAML lets
through in silence and that a rule file cannot mean is an error here: duplicate keys, custom tags, several documents,
alias bombs, leading zeros.
"""

import codecs
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from lora_fx.errors import MOST_SHOWN, Problem, RuleError, SourceSpan
from lora_fx.sources.regular import UnreadableError, read_bytes, read_stream
from lora_fx.text import shortened

MOST_BYTES = 1024 * 1024
MOST_DEPTH = 20
MOST_NODES = 100_000
LONGEST_MESSAGE = 500
_UNIT = 32
"""So many characters of a text count as much as an entry."""
Hint = str | Callable[[], str]
"""What to do; a function where it takes time to find out."""
Value = str | int | float | bool | None


@dataclass(slots=True)
class YamlNode:
    """A scalar, a list or a mapping, and where it was written."""

    where: tuple[int, int, int] | str
    """Line, column and length in a file, from 1; in a dict its path."""
    value: Value = None
    items: "list[YamlNode] | None" = None
    pairs: "list[tuple[YamlNode, YamlNode]] | None" = None
    size: int = 1
    """Number of nodes in it, long texts counted as several, and aliases each time."""
    quoted: bool = False

    @property
    def span(self) -> SourceSpan:
        return SourceSpan(path=self.where) if isinstance(self.where, str) else SourceSpan("", *self.where)

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
        value = self.value[:60] if isinstance(self.value, str) else self.value
        shown = repr(value).lower() if isinstance(value, bool) else repr(value)
        return f"the {kind} {shown if len(shown) <= 40 else shown[:37] + '…'}"


@dataclass(slots=True)
class SourceText:
    """The text that nodes come from, and the problems found in it."""

    name: str
    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    more: int = 0
    """Number of problems beside those that are kept."""

    def problem(self, span: SourceSpan, message: str, hint: Hint = "") -> None:
        """Note something wrong after which reading goes on."""
        if len(self.problems) >= MOST_SHOWN:
            self.more += 1
            return
        advice = hint if isinstance(hint, str) else hint()
        texts = (shortened(text, LONGEST_MESSAGE) for text in (message, advice))
        message, advice = texts
        self.problems.append(Problem(message, self.located(span), advice))

    def fail(self, span: SourceSpan, message: str, hint: Hint = "") -> RuleError:
        """Return an error for a problem after which nothing more can be read."""
        self.more += len(self.problems[MOST_SHOWN - 1 :])
        del self.problems[MOST_SHOWN - 1 :]
        self.problem(span, message, hint)
        return RuleError(self.name, self.problems, self.more)

    def raise_problems(self) -> None:
        """Raise a RuleError with all problems in the order of the file, if there are any."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: (problem.line, problem.column))
            raise RuleError(self.name, ordered, self.more)

    def located(self, span: SourceSpan) -> SourceSpan:
        """Return the span of a node with the name of the file and the whole line."""
        return SourceSpan(self.name, span.line, span.column, span.length, self.line(span), span.path)

    def line(self, span: SourceSpan) -> str:
        """Return the line in which a span is; nothing for rules given as a dict."""
        return self.lines[span.line - 1] if 0 < span.line <= len(self.lines) else ""


# -- files


def read_file(given: Path | IO[bytes], name: str) -> tuple[SourceText, YamlNode]:
    """Return the tree of a file, or of what is read from an open one.

    Raises:
        RuleError: it cannot be read or is not a single YAML document.
    """
    source = SourceText(name)
    try:
        content = read_bytes(given, MOST_BYTES) if isinstance(given, Path) else read_stream(given, MOST_BYTES)
    except UnreadableError as error:
        raise source.fail(SourceSpan(), str(error)) from error
    return source, _Builder(source).build(_decoded(content, source))


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
    if directive := _TAG_DIRECTIVE.search(text):  # libyaml compares each with all before it
        raise source.fail(_end_of(text[: directive.start()]), "%TAG is not supported; rules are plain data")
    return text


def _lines(text: str) -> list[str]:
    return _UNREADABLE.sub("\N{REPLACEMENT CHARACTER}", text).splitlines()


def _end_of(text: str) -> SourceSpan:
    """Return the span of the character that follows the text."""
    lines = _lines(f"{text}.")
    return SourceSpan("", len(lines), len(lines[-1]))


# -- events to nodes

_UNREADABLE = yaml.reader.Reader.NON_PRINTABLE
_TAG_DIRECTIVE = re.compile(r"^%TAG", re.MULTILINE)
_NO_NAME = re.compile(r"[\0\ud800-\udfff]")
"""What no name of a module, a file or an adapter can hold."""
_LOADER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_YAML_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {None, "!"} | {_YAML_TAG + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq")}


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not been seen."""

    node: YamlNode
    anchor: str | None
    key: YamlNode | None = None
    seen: dict[str, YamlNode] = field(default_factory=dict)


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
        kind = type(event)
        if kind is yaml.ScalarEvent:
            if event.tag not in _PLAIN_TAGS:
                raise self._tagged(event)
            self._add(self._scalar(event), event.anchor)
        elif kind is yaml.MappingStartEvent:
            self._start(event, YamlNode(_where(event), pairs=[]))
        elif kind is yaml.SequenceStartEvent:
            self._start(event, YamlNode(_where(event), items=[]))
        elif kind in (yaml.MappingEndEvent, yaml.SequenceEndEvent):
            finished = self.open.pop()
            self._add(finished.node, finished.anchor)
        elif kind is yaml.AliasEvent:
            self._alias(event)
        elif kind is yaml.DocumentStartEvent and self.root is not None:
            what = "a second document starts here; a rule file holds one"
            raise self.source.fail(SourceSpan("", *_where(event)), what)

    def _tagged(self, event: Any) -> RuleError:
        tag = str(event.tag)
        tag = f"!!{tag.removeprefix(_YAML_TAG)}" if tag.startswith(_YAML_TAG) else tag
        what = f"the tag {shortened(tag)} is not allowed; rules are plain data"
        return self.source.fail(SourceSpan("", *_where(event)), what)

    def _start(self, event: Any, node: YamlNode) -> None:
        if event.tag not in _PLAIN_TAGS:
            raise self._tagged(event)
        if len(self.open) >= MOST_DEPTH:
            raise self.source.fail(node.span, f"nested deeper than {MOST_DEPTH} levels")
        self.open.append(_Open(node, event.anchor))

    def _alias(self, event: Any) -> None:
        node = self.anchors.get(event.anchor)
        if node is None:
            span = SourceSpan("", *_where(event))
            hint = _hint_for(self.source.line(span), "alias")
            raise self.source.fail(span, f"the alias *{shortened(event.anchor)} is not defined", hint)
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
            what = f"has more than {MOST_NODES:,} entries, aliases counted each time and long texts as several"
            raise self.source.fail(node.span, what)
        if parent.node.items is not None:
            parent.node.items.append(node)
        elif parent.key is None:
            parent.key = node
        else:
            add_pair(self.source, parent.node, parent.key, node, parent.seen)
            parent.key = None

    def _scalar(self, event: Any) -> YamlNode:
        where, text = _where(event), event.value
        if not event.implicit[0] or event.style not in (None, ""):
            return text_node(self.source, where, text)
        try:
            return YamlNode(where, value=_plain_value(text), size=size_of(text))
        except ValueError as error:
            node = YamlNode(where, value=int(text[:MOST_DIGITS]))
            self.source.problem(node.span, str(error), "write it without leading zeros, or quote it")
            return node


def size_of(text: str) -> int:
    """Return how many entries a text counts as."""
    return 1 + len(text) // _UNIT


def text_node(source: SourceText, where: tuple[int, int, int] | str, text: str) -> YamlNode:
    """Return the node of a text; a character that no name can hold is a problem."""
    node = YamlNode(where, value=text, quoted=True, size=size_of(text))
    if unfit := _NO_NAME.search(text):
        source.problem(node.span, f"the character U+{ord(unfit[0]):04X} cannot stand in rules")
    return node


def _where(event: Any) -> tuple[int, int, int]:
    start, end = event.start_mark, event.end_mark
    line, column = start.line, start.column
    length = end.column - column if end.line == line else 1
    return line + 1, column + 1, max(1, length)


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


def add_pair(source: SourceText, mapping: YamlNode, key: YamlNode, value: YamlNode, seen: dict[str, YamlNode]) -> None:
    """Add a pair to a mapping; a key that is not a string or is among those seen already is a problem."""
    assert mapping.pairs is not None
    if not isinstance(key.value, str) or key.items is not None or key.pairs is not None:
        source.problem(key.span, f"a key must be a string, found {key.kind}")
        return
    if key.value == "<<" and not key.quoted:
        source.problem(key.span, "merge keys (<<) are not supported", "put what rules share under `defaults:`")
        return
    earlier = seen.setdefault(key.value, key)
    if earlier is not key:
        where = f", first in line {earlier.span.line}" if earlier.span.line else ""
        source.problem(key.span, f"the key '{shortened(key.value)}' stands here twice{where}")
        return
    mapping.pairs.append((key, value))


# -- scalars, as YAML 1.2 reads them

MOST_DIGITS = 18
"""Of an integer; a longer one is no number of anything that rules count."""
_STARTS_A_NUMBER = frozenset("-+.0123456789")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
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
    if text[0] not in _STARTS_A_NUMBER:
        return text
    if _LEADING_ZERO.fullmatch(text):
        if len(text) > MOST_DIGITS:
            raise ValueError(f"{shortened(text)} is a number with leading zeros")
        raise ValueError(f"{text} could be {int(text)} or the octal number {text}")
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= MOST_DIGITS else float(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
