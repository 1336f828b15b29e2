"""Globs over dotted names, as expressions of the automaton."""

import functools
import re
from collections.abc import Iterator

from lora_fx.rules.automaton import ANY, NOT_DOT, Characters, Choice, Concatenation, Expression, Repeat, literal

MOST_NUMBERS = 10_000
MOST_DEPTH = 50
"""Braces in braces, groups in groups."""
_SEGMENT = Repeat(NOT_DOT, 1)
_DOT = literal(".")
_PLAIN = re.compile(r"[\w-]+")
_CLASS_ITEM = re.compile(r"(.)-(.)|(.)", re.DOTALL)
_TOKEN = re.compile(r"\\.|[{}\[\].]", re.DOTALL)
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})(?=[,}])")
_DIGITS = "0123456789"


class PatternError(ValueError):
    """A pattern cannot be read; `offset` and `length` say where in it."""

    def __init__(self, message: str, offset: int = 0, length: int = 1) -> None:
        super().__init__(message)
        self.offset = offset
        self.length = length


class Cursor:
    """A part of a pattern that is read from the left; it begins at `offset` of the pattern, where errors point."""

    def __init__(self, text: str, offset: int) -> None:
        self.text = text
        self.offset = offset
        self.at = 0
        self._depth = 0

    def descend(self, start: int) -> None:
        """Note that what follows stands inside of what opens at `start`; `ascend` ends it."""
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise self.error(f"the pattern is nested deeper than {MOST_DEPTH} levels", start)

    def ascend(self) -> None:
        self._depth -= 1

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def next(self) -> str:
        self.at += 1
        return self.text[self.at - 1 : self.at]

    def skips(self, expected: str) -> bool:
        """Whether this text comes next; if so, it is read."""
        comes = self.text.startswith(expected, self.at)
        self.at += comes * len(expected)
        return comes

    def error(self, message: str, at: int, length: int = 1) -> PatternError:
        return PatternError(message, self.offset + at, length)

    def error_since(self, start: int, message: str) -> PatternError:
        """Return an error about all that has been read from `start` on."""
        return self.error(message, start, self.at - start)


def parse_glob(text: str) -> Expression:
    """Return the expression of a glob.

    `*` is part of one segment, `**` any number of whole segments (none included), `?` one character, `[ab]`, `[a-z]`
    and `[!ab]` one of or none of them, `{a,b}` either, `{0..11}` a number (also `{0..3,9}`), `\\` takes the next
    character as it is.
    """
    if not text:
        raise PatternError("the pattern is empty")
    segments = _split(text)
    parts: list[Expression] = []
    for position, (segment, offset) in enumerate(segments):
        last = position == len(segments) - 1
        if segment == "**":
            some = Concatenation((_DOT, _SEGMENT) if last else (_SEGMENT, _DOT))
            parts.append(Repeat(ANY if len(segments) == 1 else some))
            continue
        parts.append(_Segment(segment, offset).parse())
        if not last and not (segments[position + 1][0] == "**" and position + 2 == len(segments)):
            parts.append(_DOT)
    return Concatenation(tuple(parts))


def _split(text: str) -> list[tuple[str, int]]:
    """Return (segment, offset) for the dots outside of braces and brackets; repeated `**` count once."""
    dots, depth = [], 0
    for token in _TOKEN.finditer(text):
        if token[0] == "." and depth == 0:
            dots.append(token.start())
        depth = max(0, depth + (token[0] in "{[") - (token[0] in "}]"))
    segments: list[tuple[str, int]] = []
    start = 0
    for end in [*dots, len(text)]:
        segment = text[start:end]
        if not segment:
            raise PatternError("the pattern has an empty segment", min(start, len(text) - 1))
        if segment != "**" and "**" in segment:
            raise PatternError("`**` stands for whole segments: write it between dots", start + segment.index("**"), 2)
        if not (segment == "**" and segments and segments[-1][0] == "**"):
            segments.append((segment, start))
        start = end + 1
    return segments


class _Segment(Cursor):
    """Parses one segment."""

    _double_dot = -1
    """Where two dots were last seen."""

    def parse(self) -> Expression:
        expression = self._until("}")
        if self.peek():
            raise self.error(f"unbalanced `{self.peek()}`", self.at)
        return expression

    def _until(self, stops: str) -> Expression:
        parts: list[Expression] = []
        while (character := self.peek()) and character not in stops:
            parts.append(self._one())
        return Concatenation(tuple(parts))

    def _one(self) -> Expression:
        plain = _PLAIN.match(self.text, self.at)
        if plain:
            self.at = plain.end()
            return literal(plain[0])
        character = self.next()
        if character == "." == self.peek():
            self._double_dot = self.at - 1
        if character == "*":
            return Repeat(NOT_DOT)
        if character == "?":
            return NOT_DOT
        if character == "[":
            return self._bracket()
        if character == "{":
            return self._brace()
        if character == "]":
            raise self.error("unbalanced `]`", self.at - 1)
        if character == "\\" and not (character := self.next()):
            raise self.error("a backslash at the end", self.at - 2)
        return literal(character)

    def _bracket(self) -> Expression:
        start = self.at - 1
        end = self.text.find("]", self.at)
        inside = self.text[self.at : end]
        if end < 0 or not inside.lstrip("!"):
            raise self.error("`[` without `]`" if end < 0 else "`[]` is empty", start)
        self.at = end + 1
        negated = inside.startswith("!")
        items = _CLASS_ITEM.findall(inside.removeprefix("!"))
        ranges = tuple((low or only, high or only) for low, high, only in items)
        if any(low > high for low, high in ranges):
            raise self.error_since(start, "the range runs backwards")
        return Characters.of((*ranges, (".", ".")) if negated else ranges, negated)

    def _brace(self) -> Expression:
        start = self.at - 1
        self.descend(start)
        choices = [self._choice()]
        while self.skips(","):
            choices.append(self._choice())
        self.ascend()
        if not self.skips("}"):
            raise self.error("`{` without `}`", start)
        return Choice(tuple(choices))

    def _choice(self) -> Expression:
        """Return one of the parts of a brace: a range of numbers, or a pattern."""
        start = self.at
        numbers = _RANGE.match(self.text, start)
        if numbers:
            self.at = numbers.end()
            return self._numbers(int(numbers[1]), int(numbers[2]), start)
        expression = self._until(",}")
        if self._double_dot >= start:
            raise self.error_since(start, "`..` stands between two numbers, such as {0..11}")
        return expression

    def _numbers(self, low: int, high: int, start: int) -> Expression:
        if low > high or high - low >= MOST_NUMBERS:
            problem = "runs backwards" if low > high else f"has more than {MOST_NUMBERS:,} numbers"
            raise self.error_since(start, f"the range {low}..{high} {problem}")
        return _numbers(low, high)


@functools.lru_cache(maxsize=256)
def _numbers(low: int, high: int) -> Expression:
    """Return the expression of the numbers between two numbers."""
    return Choice(tuple(_numbers_of_length(low, high)))


def _numbers_of_length(low: int, high: int) -> Iterator[Expression]:
    """Yield an expression for the numbers of each length between two numbers."""
    for length in range(len(str(low)), len(str(high)) + 1):
        least = 0 if length == 1 else 10 ** (length - 1)
        yield _between(str(max(low, least)), str(min(high, 10**length - 1)))


def _between(low: str, high: str) -> Expression:
    """Return the expression of the numbers between two of the same length: a few states for each digit."""
    if not low:
        return Concatenation(())
    first, last, rest = low[0], high[0], len(low) - 1
    if first == last:
        return Concatenation((*literal(first).parts, _between(low[1:], high[1:])))
    choices = [
        Concatenation((*literal(first).parts, _between(low[1:], "9" * rest))),
        Concatenation((*literal(last).parts, _between("0" * rest, high[1:]))),
    ]
    if inner := _DIGITS[int(first) + 1 : int(last)]:
        any_digit = Characters((("0", "9"),))
        choices.append(Concatenation((Characters(((inner[0], inner[-1]),)), *[any_digit] * rest)))
    return Choice(tuple(choices))
