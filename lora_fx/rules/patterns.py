"""Patterns of rules: names (globs and `re:` expressions) and shapes; and what looks like a pattern that misses."""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_fx.errors import RefusedError
from lora_fx.rules.automaton import MOST_STATES, Automaton, Expression
from lora_fx.rules.expressions import parse_expression
from lora_fx.rules.globs import PatternError, parse_glob
from lora_fx.rules.keys import SIZE
from lora_fx.text import shortened

EXPRESSION_PREFIX = "re:"


MOST_NAME = 2_000
"""Of a name that is matched; no model has such names."""


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A glob over dotted names, or with the prefix `re:` a regular expression that must match the whole name.

    Matching takes time linear in the name, whatever the pattern.

    Raises:
        PatternError: where the text is not a pattern.
    """

    text: str

    def __post_init__(self) -> None:
        _compiled(self.text)

    @property
    def states(self) -> int:
        """About how many states its automaton has, and at least as many as the text has characters."""
        return _compiled(self.text).states

    def matches(self, name: str) -> bool:
        """Whether the whole name matches; RefusedError for a name that is no model's."""
        if len(name) > MOST_NAME:
            headline = f"a name of {len(name):,} characters cannot be matched; at most {MOST_NAME:,} can"
            raise RefusedError(headline, [(shortened(name), "is the name")])
        return automaton_of(self.text).matches(name)

    def __str__(self) -> str:
        return self.text


class _Compiled:
    """A pattern that was read; its automaton is made when it is first matched, so that linting need not."""

    def __init__(self, text: str) -> None:
        if len(text) > MOST_STATES:
            raise PatternError(f"the pattern has more than {MOST_STATES:,} characters", 0, len(text))
        self.expression = _parsed(text)
        self.states = max(self.expression.states, len(text))
        if self.states > MOST_STATES:
            raise PatternError(f"the pattern needs more than {MOST_STATES:,} states", 0, len(text))
        self.automaton: Automaton | None = None


_known: dict[str, _Compiled] = {}
"""The patterns read last, of at most _MOST_KNOWN states together."""
_MOST_KNOWN = 400_000
_sizes = {"states": 0}


def _parsed(text: str) -> Expression:
    if text.startswith(EXPRESSION_PREFIX):
        return parse_expression(text.removeprefix(EXPRESSION_PREFIX), len(EXPRESSION_PREFIX))
    return parse_glob(text)


def _compiled(text: str) -> _Compiled:
    """Return the pattern that a text stands for; PatternError where it is not one, or is too large."""
    compiled = _known.get(text)
    if compiled is None:
        compiled = _Compiled(text)
        _sizes["states"] += compiled.states
        if _sizes["states"] > _MOST_KNOWN:
            _known.clear()
            _sizes["states"] = compiled.states
        _known[text] = compiled
    return compiled


def automaton_of(text: str) -> Automaton:
    """Return the compiled pattern."""
    compiled = _compiled(text)
    if compiled.automaton is None:
        compiled.automaton = Automaton(compiled.expression)
    return compiled.automaton


def glob_of(name: str) -> str:
    """Return the glob that matches this name alone."""
    escaped = _SIGNS.sub(r"\\\g<0>", name)
    return f"\\{escaped}" if escaped.startswith(EXPRESSION_PREFIX) else escaped


_SIGNS = re.compile(r"[\\*?\[\]{}]")


# -- what looks like a pattern


def nearest_names(pattern: NamePattern, names: Iterable[str], most: int = 3) -> tuple[str, ...]:
    """Return up to `most` of the names that look most like what the pattern means, the nearest first.

    Names are compared segment by segment from their ends, as people misspell them.
    """
    wanted = _plain_segments(pattern.text)
    scored = [(_likeness(wanted, name.split(".")), name) for name in dict.fromkeys(names)]
    best = sorted((pair for pair in scored if pair[0] >= _LEAST_LIKENESS), key=lambda pair: -pair[0])
    return tuple(name for score, name in best[:most] if score >= 0.8 * best[0][0])


_LEAST_LIKENESS = 0.4
_LONGEST_WORD, _MOST_SPELLINGS = 100, 20
"""Beyond which nothing is compared: it takes time quadratic in the length."""
_WILD = re.compile(r"[*?\[\]{}]")


def _plain_segments(text: str) -> list[str]:
    """Return the pattern's segments from the last to the first; `**` ends it, since anything may stand there."""
    cleaned = re.sub(r"\\(.)", r"\1", text.removeprefix(EXPRESSION_PREFIX)).replace(".*", "*").strip("^$")
    cleaned = re.sub(r"\{(\d+)\.\.\d+\}", r"\1", cleaned)
    segments = cleaned.split(".")[::-1]
    return segments[: segments.index("**")] if "**" in segments else segments


def _likeness(words: Sequence[str], segments: Sequence[str]) -> float:
    """Return 0…1: how alike the last segments are; the last one counts for half."""
    if not words:
        return 0.0
    scores = [_alike(word, segment) for word, segment in zip(words, reversed(segments), strict=False)]
    rest = len(words) - 1
    return scores[0] if not rest else 0.5 * scores[0] + 0.5 * sum(scores[1:]) / rest


@functools.lru_cache(maxsize=65536)
def _alike(word: str, segment: str) -> float:
    if word == "*":
        return 1.0
    if len(segment) > _LONGEST_WORD:
        return 0.0
    return max(difflib.SequenceMatcher(a=_WILD.sub("", spelling), b=segment).ratio() for spelling in _spellings(word))


def _spellings(word: str) -> list[str]:
    """Return what the first `{a,b}` of a word stands for."""
    prefix, brace, rest = word.partition("{")
    choices, closed, suffix = rest.partition("}")
    spelt = [prefix + choice + suffix for choice in choices.split(",")] if brace and closed else [word]
    return [spelling[:_LONGEST_WORD] for spelling in spelt[:_MOST_SPELLINGS]]


# -- shapes

DIMENSION_FORMS = '1024, "*", ">=1024", "512..4096", d, 3*d'


@dataclass(frozen=True, slots=True)
class Dimension:
    """What one dimension must be: between two bounds, or a multiple of a letter."""

    text: str
    low: int = 0
    high: int | None = None
    letter: str = ""
    factor: int = 1

    def explain(self, size: int, letters: dict[str, int]) -> str | None:
        """Return why the size does not fit, or None; a letter is bound by its first use."""
        if not self.letter:
            fits = self.low <= size and (self.high is None or size <= self.high)
            return None if fits else f"{size} is not {self.text}"
        if self.letter not in letters:
            if size % self.factor:
                return f"{size} is not a multiple of {self.factor}"
            letters[self.letter] = size // self.factor
        expected = self.factor * letters[self.letter]
        return None if size == expected else f"{size} is not {self.text} = {expected}"


def parse_dimension(value: int | str) -> Dimension:
    """Return the dimension that a rule writes as `value`; PatternError if it is not one."""
    if isinstance(value, int):
        return Dimension(str(value), value, value)
    text = value.strip()
    match = re.fullmatch(SIZE, text)
    if match is None:
        raise PatternError(f"`{shortened(value)}` is not a size", 0, len(value))
    sign, bound, first, last, factor, letter = match.groups()
    if sign in (">", ">="):
        return Dimension(text, int(bound) + (sign == ">"))
    if sign:
        return Dimension(text, 0, int(bound) - (sign == "<"))
    if first and int(first) > int(last):
        raise PatternError(f"the range {text} runs backwards", 0, len(text))
    if factor and int(factor) == 0:
        raise PatternError("a factor of 0", 0, len(text))
    low, high = (int(first), int(last)) if first else (0, None)
    return Dimension(text, low, high, letter or "", int(factor or 1))


@dataclass(frozen=True, slots=True)
class ShapePattern:
    """What a weight's shape must be, [out, in] as `nn.Linear.weight`."""

    dimensions: tuple[Dimension, ...]

    def explain(self, shape: Sequence[int]) -> str | None:
        """Return why a shape does not match, or None if it does."""
        if len(shape) != len(self.dimensions):
            return f"it has {len(shape)} dimensions, not {len(self.dimensions)}"
        letters: dict[str, int] = {}
        names = ("out", "in", *(f"dimension {position}" for position in range(2, len(shape))))
        for name, dimension, size in zip(names, self.dimensions, shape, strict=False):
            problem = dimension.explain(size, letters)
            if problem is not None:
                return f"{name} = {problem}"
        return None

    def values(self) -> list[int | str]:
        """Return the dimensions as a rule writes them."""
        return [int(size.text) if size.text.isdecimal() else size.text for size in self.dimensions]

    def __str__(self) -> str:
        return f"[{', '.join(size.text for size in self.dimensions)}]"
