"""Regular expressions (`re:` patterns), the part of them that matches in linear time.

Literals, `.`, classes with ranges and negation, `\\d \\w \\s` and their opposites, escapes, groups, `|`, `* + ?`,
`{m}`, `{m,}`, `{m,n}`, `^` first and `$` last.  Look-around, back-references and flags are refused.  Means what
Python's `re.fullmatch` means.
"""

from __future__ import annotations

import re

from lora_fx.rules.automaton import Characters, Choice, Concatenation, Expression, Repeat, literal
from lora_fx.rules.globs import PatternError

MOST_REPEATS = 1_000
_DIGIT = (("0", "9"),)
_WORD = (("0", "9"), ("A", "Z"), ("_", "_"), ("a", "z"))
_SPACE = (("\t", "\r"), (" ", " "))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_COUNT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")


def parse_expression(text: str) -> Expression:
    """Return the expression of a regular expression; PatternError where it is not of the linear part."""
    if not text:
        raise PatternError("the expression is empty")
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def parse(self) -> Expression:
        if self._peek() == "^":
            self.at += 1
        expression = self._choice()
        if self._peek() == "$":
            self.at += 1
        if self.at < len(self.text):
            raise self._wrong()
        return expression

    def _wrong(self) -> PatternError:
        character = self.text[self.at]
        problems = {")": "`)` without `(`", "$": "`$` stands only at the end", "^": "`^` stands only at the start"}
        return PatternError(problems.get(character, f"nothing to repeat before `{character}`"), self.at)

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _choice(self) -> Expression:
        parts = [self._chain()]
        while self._peek() == "|":
            self.at += 1
            parts.append(self._chain())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _chain(self) -> Expression:
        parts: list[Expression] = []
        while (character := self._peek()) and character not in "|)":
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
            raise PatternError("the repetition runs backwards", start, self.at - start)
        if max(low, high or 0) > MOST_REPEATS:
            raise PatternError(f"more than {MOST_REPEATS:,} repetitions", start, self.at - start)
        if self._peek() == "?":  # lazy: the same texts match as a whole
            self.at += 1
        elif self._peek() == "+":
            raise PatternError("possessive repetition is not supported", self.at)
        elif self._peek() in ("*", "{") and self._peek() and self._bounds() is not None:
            raise PatternError("two repetitions in a row", start, self.at - start)
        return Repeat(part, low, high)

    def _bounds(self) -> tuple[int, int | None] | None:
        character = self._peek()
        if character and character in "*+?":
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        count = _COUNT.match(self.text, self.at)
        if count is None:
            return None
        self.at = count.end()
        low = int(count[1])
        return (low, low if count[2] is None else int(count[3]) if count[3] else None)

    def _atom(self) -> Expression:
        character = self._peek()
        self.at += 1
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
        if self.text.startswith("?:", self.at):
            self.at += 2
        elif self._peek() == "?":
            raise PatternError("look-around, named groups and flags are not supported", start, 3)
        expression = self._choice()
        if self._peek() != ")":
            raise PatternError("`(` without `)`", start)
        self.at += 1
        return expression

    def _escape(self) -> Expression:
        kind = self._peek()
        self.at += 1
        if not kind:
            raise PatternError("a backslash at the end", self.at - 2)
        if kind.lower() in _CLASSES:
            return Characters(_CLASSES[kind.lower()], negated=kind.isupper())
        return literal(self._escaped_character(kind))

    def _escaped_character(self, kind: str) -> str:
        if kind in _CONTROL:
            return _CONTROL[kind]
        if kind.isalnum():
            what = "back-references are" if kind.isdigit() else f"`\\{kind}` is"
            raise PatternError(f"{what} not supported", self.at - 2, 2)
        return kind

    def _class(self) -> Expression:
        start = self.at - 1
        negated = self._peek() == "^"
        self.at += negated
        ranges: list[tuple[str, str]] = []
        first = True
        while first or self._peek() != "]":
            if not self._peek():
                raise PatternError("`[` without `]`", start)
            ranges += self._class_item()
            first = False
        self.at += 1
        return Characters(tuple(ranges), negated)

    def _class_item(self) -> list[tuple[str, str]]:
        start = self.at
        low = self._class_character()
        if isinstance(low, tuple):
            return list(low)
        if self._peek() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return [(low, low)]
        self.at += 1
        high = self._class_character()
        if isinstance(high, tuple) or high < low:
            raise PatternError("the range is not one", start, self.at - start)
        return [(low, high)]

    def _class_character(self) -> str | tuple[tuple[str, str], ...]:
        character = self._peek()
        self.at += 1
        if character != "\\":
            return character
        kind = self._peek()
        self.at += 1
        if kind in _CLASSES:
            return _CLASSES[kind]
        if kind.lower() in _CLASSES or not kind:
            raise PatternError(f"`\\{kind}` inside `[]` is not supported", self.at - 2, 2)
        return self._escaped_character(kind)
