"""Regular expressions (`re:` patterns), the part of them that matches in linear time.

Literals, `.`, classes with ranges and negation, `\\d \\w \\s` and their opposites, escapes, groups, `|`, `* + ?`,
`{m}`, `{m,}`, `{m,n}`, `^` first and `$` last.  Look-around, back-references and flags are refused.  Means what
Python's `re.fullmatch` means.
"""

import re

from lora_fx.rules.automaton import Characters, Choice, Concatenation, Expression, Repeat, literal
from lora_fx.rules.globs import Cursor, PatternError

MOST_REPEATS = 1_000
_DIGIT = (("0", "9"),)
_WORD = (("0", "9"), ("A", "Z"), ("_", "_"), ("a", "z"))
_SPACE = (("\t", "\r"), (" ", " "))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_REPEATED = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_COUNT = re.compile(r"[*+?]|\{([0-9]+)(?:(,)([0-9]*))?\}")


def parse_expression(text: str, offset: int) -> Expression:
    """Return the expression of a regular expression that begins at `offset` of a pattern.

    Raises:
        PatternError: it is not of the part that matches in linear time.
    """
    if not text:
        raise PatternError("the expression is empty", offset)
    return _Parser(text, offset).parse()


def _number(digits: str) -> int:
    """Return the number that digits stand for, and of many thousand digits one that is too large as well."""
    significant = digits.lstrip("0")
    return int(significant[: len(str(MOST_REPEATS)) + 1] or "0")


class _Parser(Cursor):
    def parse(self) -> Expression:
        self.skips("^")
        expression = self._choice()
        self.skips("$")
        if self.at < len(self.text):
            raise self._wrong()
        return expression

    def _wrong(self) -> PatternError:
        character = self.peek()
        problems = {")": "`)` without `(`", "$": "`$` stands only at the end", "^": "`^` stands only at the start"}
        return self.error(problems.get(character, f"nothing to repeat before `{character}`"), self.at)

    def _choice(self) -> Expression:
        parts = [self._chain()]
        while self.skips("|"):
            parts.append(self._chain())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _chain(self) -> Expression:
        parts: list[Expression] = []
        while (character := self.peek()) and character not in "|)":
            if character == "$" and self.at == len(self.text) - 1:
                break
            if character in "*+?^$":
                raise self._wrong()
            parts.append(self._repeated(self._atom()))
        return Concatenation(tuple(parts))

    def _repeated(self, part: Expression) -> Expression:
        start = self.at
        bounds = self._bounds()
        if bounds is None:
            return part
        low, high = bounds
        if high is not None and high < low:
            raise self.error_since(start, "the repetition runs backwards")
        if max(low, high or 0) > MOST_REPEATS:
            raise self.error_since(start, f"more than {MOST_REPEATS:,} repetitions")
        if self.skips("?"):  # lazy: the same texts match as a whole
            return Repeat(part, low, high)
        if self.peek() == "+":
            raise self.error("possessive repetition is not supported", self.at)
        if self._bounds() is not None:
            raise self.error_since(start, "two repetitions in a row")
        return Repeat(part, low, high)

    def _bounds(self) -> tuple[int, int | None] | None:
        count = _COUNT.match(self.text, self.at)
        if count is None:
            return None
        self.at = count.end()
        if count[0] in _REPEATED:
            return _REPEATED[count[0]]
        low = _number(count[1])
        return (low, low if count[2] is None else _number(count[3]) if count[3] else None)

    def _atom(self) -> Expression:
        character = self.next()
        if character == ".":
            return Characters((("\n", "\n"),), negated=True)
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            return self._escape()
        return literal(character)

    def _group(self) -> Expression:
        start = self.at - 1
        if not self.skips("?:") and self.peek() == "?":
            raise self.error("look-around, named groups and flags are not supported", start, 3)
        self.descend(start)
        expression = self._choice()
        self.ascend()
        if not self.skips(")"):
            raise self.error("`(` without `)`", start)
        return expression

    def _escape(self) -> Expression:
        kind = self.next()
        if not kind:
            raise self.error("a backslash at the end", self.at - 2)
        if kind.lower() in _CLASSES:
            return Characters(_CLASSES[kind.lower()], negated=kind.isupper())
        return literal(self._escaped_character(kind))

    def _escaped_character(self, kind: str) -> str:
        if kind in _CONTROL:
            return _CONTROL[kind]
        if kind.isalnum():
            what = "back-references are" if kind.isdigit() else f"`\\{kind}` is"
            raise self.error(f"{what} not supported", self.at - 2, 2)
        return kind

    def _class(self) -> Expression:
        start = self.at - 1
        negated = self.skips("^")
        ranges = self._class_item(start)
        while not self.skips("]"):
            ranges += self._class_item(start)
        return Characters.of(ranges, negated)

    def _class_item(self, opened: int) -> list[tuple[str, str]]:
        if not self.peek():
            raise self.error("`[` without `]`", opened)
        start = self.at
        low = self._class_character()
        if isinstance(low, tuple):
            return list(low)
        if self.peek() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return [(low, low)]
        self.at += 1
        high = self._class_character()
        if isinstance(high, tuple) or high < low:
            raise self.error_since(start, "the range is not one")
        return [(low, high)]

    def _class_character(self) -> str | tuple[tuple[str, str], ...]:
        character = self.next()
        if character != "\\":
            return character
        kind = self.next()
        if kind in _CLASSES:
            return _CLASSES[kind]
        if kind.lower() in _CLASSES or not kind:
            raise self.error(f"`\\{kind}` inside `[]` is not supported", self.at - 2, 2)
        return self._escaped_character(kind)
