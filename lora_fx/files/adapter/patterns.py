"""PEFT's rank_pattern and alpha_pattern: which entry means which layer, in time that follows the size of the file."""

import functools
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.names import CONFIG_FILE, ends_of
from lora_fx.rules.globs import PatternError
from lora_fx.rules.patterns import EXPRESSION_PREFIX, NamePattern

Number = TypeVar("Number", int, float)
_MOST_EXPRESSIONS, _LONGEST = 100, 1_000
_SECONDS, _SECONDS_PER_NAME = 0.5, 1e-4
"""Of the processor: what all entries of a table may take, and how much more for each name that it is asked about."""
_PLAIN = re.compile(r"(\^?)((?:[^.^$*+?{}\[\]\\|()\0]|\\[^A-Za-z0-9_\0]|\.)+)\$?")
"""A name as it is, or escaped; a dot that is not escaped stands for any character."""


class _Form(NamedTuple):
    """Where the dots of a plain entry stand: entries of one form are looked up at once."""

    is_anchored: bool
    pieces: tuple[tuple[int, int], ...]
    """Where each piece between them begins and ends."""


class Patterns(Generic[Number]):
    r"""A table of PEFT's: a key means the names with `re.match(rf"(.*\.)?({key})$", name)`, and the first key counts.

    Keys that are names, as nearly all are, are looked up; there may be some expressions.  `problems` has, by key, why
    one cannot be read.
    """

    def __init__(self, values: Mapping[str, Number]) -> None:
        self.problems: dict[str, str] = {}
        self._keys, self._values = [*values], [*values.values()]
        self._plain: dict[int, dict[_Form, dict[tuple[str, ...], list[int]]]] = {}
        """Numbers of keys, by the length of what they mean, form, and pieces between dots."""
        self._expressions: dict[int, _Expression] = {}
        self._found: dict[str, tuple[int, ...]] = {}
        self._seconds = _SECONDS
        for number, key in enumerate(self._keys):
            try:
                self._add(number, key)
            except PatternError as error:
                self.problems[key] = str(error)

    def _add(self, number: int, key: str) -> None:
        plain = _PLAIN.fullmatch(key)
        if plain is not None:
            texts = re.sub(r"\\(.)|\.", lambda sign: sign[1] or "\0", plain[2], flags=re.DOTALL).split("\0")
            ends = accumulate(texts, lambda end, text: end + 1 + len(text), initial=-1)
            pieces = tuple((end + 1, end + 1 + len(text)) for end, text in zip(ends, texts, strict=False))
            forms = self._plain.setdefault(pieces[-1][1], {})
            forms.setdefault(_Form(bool(plain[1]), pieces), {}).setdefault(tuple(texts), []).append(number)
        elif len(key) > _LONGEST:
            raise PatternError(f"is an expression of {len(key):,} characters; at most {_LONGEST:,} are read")
        elif len(self._expressions) == _MOST_EXPRESSIONS:
            raise PatternError(f"is one of more than {_MOST_EXPRESSIONS} expressions; write names instead")
        else:
            self._expressions[number] = _expression(key)

    def value(self, name: str, default: Number) -> Number:
        """Return what the first key that means the name says."""
        fitting = self._fitting(name) if self._keys else ()
        return self._values[fitting[0]] if fitting else default

    def items(self) -> list[tuple[str, Number]]:
        """Return the keys and their values, in the order in which they count."""
        return list(zip(self._keys, self._values, strict=True))

    def idle(self, names: Iterable[str]) -> list[str]:
        """Return the keys that mean none of the names."""
        used = {number for name in names for number in self._fitting(name)}
        return [key for number, key in enumerate(self._keys) if number not in used]

    def _fitting(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the keys that mean a name.

        Raises:
            AdapterFileError: it takes too long.
        """
        if not self._keys:
            return ()
        if name not in self._found:
            begun = time.process_time()
            self._seconds += _SECONDS_PER_NAME
            numbers = [*self._plain_ones(name)]
            for number, expression in self._expressions.items():
                left = self._seconds - (time.process_time() - begun)
                if expression.matches(name, left):
                    numbers.append(number)
            self._seconds -= time.process_time() - begun
            if self._seconds < 0:
                raise _too_slow(f"{len(self._keys):,} entries", name)
            self._found[name] = tuple(sorted(numbers))
        return self._found[name]

    def _plain_ones(self, name: str) -> Iterator[int]:
        for end in ends_of(name):
            for form, keys in self._plain.get(len(end), {}).items():
                if not form.is_anchored or end is name:
                    yield from keys.get(tuple(end[start:stop] for start, stop in form.pieces), ())


def _too_slow(what: str, name: str) -> AdapterFileError:
    return AdapterFileError(CONFIG_FILE, "has patterns that take too long to match", [(f"{what:.80}", f"{name:.80}")])


def plain_name(key: str) -> tuple[str, bool] | None:
    """Return the name that a key is, and whether it means that name alone and not its ends; None for an expression."""
    plain = _PLAIN.fullmatch(key)
    return None if plain is None else (re.sub(r"\\(.)", r"\1", plain[2], flags=re.DOTALL), bool(plain[1]))


def whole_match(expression: str, name: str, otherwise: bool = False) -> bool:
    """Whether an expression is the whole name, as `re.fullmatch` says it.

    Raises:
        AdapterFileError: it takes too long.
        PatternError: it is not an expression.
    """
    return _whole(expression).matches(name, _SECONDS)


@functools.lru_cache(maxsize=16)
def _whole(expression: str) -> "_Expression":
    try:
        return _Linear(NamePattern(EXPRESSION_PREFIX + expression))
    except PatternError as error:
        return _Backtracking.of(rf"(?:{expression})\Z", error)


class _Expression(Protocol):
    """What a key means that is more than a name."""

    def matches(self, name: str, seconds: float) -> bool: ...


@functools.lru_cache(maxsize=256)
def _expression(key: str) -> _Expression:
    """Return what an expression means: asked in linear time, since anybody may have written it.

    What cannot be (look-around, back-references) is asked for a limited time.

    Raises:
        PatternError: the key is not an expression, or needs the package `regex`, which transformers brings.
    """
    text = key.removesuffix("$")
    whole = text[1:] if text.startswith("^") and "|" not in text else rf"(.*\.)?({text})"
    try:
        return _Linear(NamePattern(EXPRESSION_PREFIX + whole))
    except PatternError as error:
        return _Backtracking.of(rf"(.*\.)?({key})$", error)


@dataclass(frozen=True, slots=True)
class _Linear:
    pattern: NamePattern

    def matches(self, name: str, seconds: float) -> bool:
        return self.pattern.matches(name)


@dataclass(frozen=True, slots=True)
class _Backtracking:
    """An expression that cannot be matched in linear time; one that takes long is refused."""

    expression: Any

    @staticmethod
    def of(text: str, unsupported: PatternError) -> "_Backtracking":
        try:
            import regex
        except ImportError:
            raise unsupported from None
        try:
            return _Backtracking(regex.compile(text))
        except regex.error as error:
            raise unsupported from error

    def matches(self, name: str, seconds: float) -> bool:
        try:
            return self.expression.match(name, timeout=max(seconds, 1e-3)) is not None
        except TimeoutError as error:
            raise _too_slow(self.expression.pattern, name) from error
