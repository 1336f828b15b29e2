"""Matching in linear time: an expression becomes a nondeterministic automaton, simulated with a bounded memory.

No expression can blow up on a hostile name: every character costs at most one step through the automaton's states, and
usually one look-up.  Source: Thompson 1968, doi:10.1145/363347.363387; the lazily built deterministic automaton is
that of RE2 (Cox 2010).
"""

import functools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakSet

MOST_STATES = 50_000
"""More than these should be refused, not expanded: `{2,1000}` inside `{2,1000}`."""
_MOST_REMEMBERED = 200_000
_LAST = "\U0010ffff"


@dataclass(frozen=True, slots=True)
class Characters:
    """One character out of the ranges (inclusive, in order, none overlapping), or out of all others."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool = False

    @staticmethod
    def of(ranges: Iterable[tuple[str, str]], negated: bool = False) -> "Characters":
        """Return what one of the ranges accepts, in whatever order they come."""
        merged: list[tuple[str, str]] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return Characters(tuple(merged), negated)

    @property
    def states(self) -> int:
        return 1

    def accepts(self, character: str) -> bool:
        position = bisect_right(self.ranges, (character, _LAST)) - 1
        return (position >= 0 and character <= self.ranges[position][1]) != self.negated


ANY = Characters((), negated=True)
NOT_DOT = Characters(((".", "."),), negated=True)


@dataclass(frozen=True)
class Concatenation:
    """The parts one after another."""

    parts: "tuple[Expression, ...]"

    @functools.cached_property
    def states(self) -> int:
        """About how many states its automaton has."""
        return 1 + sum(part.states for part in self.parts)


@dataclass(frozen=True)
class Choice:
    """One of the parts."""

    parts: "tuple[Expression, ...]"

    @functools.cached_property
    def states(self) -> int:
        return 1 + sum(part.states for part in self.parts)


@dataclass(frozen=True)
class Repeat:
    """The part at least `low` times, at most `high` times; None = any number."""

    part: "Expression"
    low: int = 0
    high: int | None = None

    @functools.cached_property
    def states(self) -> int:
        return self.part.states * max(self.low + 1, self.high or 0) + 1


Expression = Characters | Concatenation | Choice | Repeat


@functools.lru_cache(maxsize=1024)
def _only(character: str) -> Characters:
    return Characters(((character, character),))


def literal(text: str) -> Concatenation:
    """Return the expression that only this text matches."""
    return Concatenation(tuple(map(_only, text)))


def literal_end(expression: Expression, first: bool = False) -> tuple[str, bool]:
    """Return (the text with which whatever matches ends, whether that is all of it); or begins, if `first`."""
    if isinstance(expression, Characters) and not expression.negated and len(expression.ranges) == 1:
        low, high = expression.ranges[0]
        return (low, True) if low == high else ("", False)
    if not isinstance(expression, Concatenation):
        return "", False
    pieces: list[str] = []
    for part in expression.parts if first else reversed(expression.parts):
        piece, whole = literal_end(part, first)
        pieces.append(piece)
        if not whole:
            break
    else:
        whole = True
    return "".join(pieces if first else reversed(pieces)), whole


class Automaton:
    """A compiled expression."""

    remembered = 0
    """Steps and states that all automata remember; forgotten by all when there are too many."""
    _living: ClassVar["WeakSet[Automaton]"] = WeakSet()

    def __init__(self, expression: Expression) -> None:
        self.expression = expression
        self._steps: list[tuple[Characters, int] | None] = []
        self._free: list[Sequence[int]] = []
        self._end = self._state()
        start = self._build(expression, self._end)
        self._start = self._closure([start])
        self._begins, _ = literal_end(expression, first=True)
        self._ends, _ = literal_end(expression)
        self._after: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self.work = 0
        """States visited so far; what tests count instead of time."""
        Automaton._living.add(self)

    def matches(self, text: str) -> bool:
        """Whether the whole text matches."""
        if not (text.startswith(self._begins) and text.endswith(self._ends)):
            return False
        states = self._start
        for character in text:
            after = self._after.get((states, character))
            states = self._advance(states, character) if after is None else after
            if not states:
                return False
        return self._end in states

    def _advance(self, states: frozenset[int], character: str) -> frozenset[int]:
        """Return the states after a character, and remember them."""
        self.work += len(states)
        accepts: dict[int, bool] = {}
        reached = []
        for state in states:
            if step := self._steps[state]:
                characters, following = step
                known = accepts.get(id(characters))
                if known is None:
                    known = accepts[id(characters)] = characters.accepts(character)
                if known:
                    reached.append(following)
        after = self._closure(reached)
        Automaton.remembered += 1 + len(after)
        if Automaton.remembered > _MOST_REMEMBERED:
            for automaton in list(Automaton._living):
                automaton._after.clear()
            Automaton.remembered = 1 + len(after)
        self._after[states, character] = after
        return after

    def _closure(self, states: Sequence[int]) -> frozenset[int]:
        """Return the states and all that are reached from them without a character."""
        waiting, reached = list(states), set(states)
        while waiting:
            for following in self._free[waiting.pop()]:
                if following not in reached:
                    reached.add(following)
                    waiting.append(following)
        return frozenset(reached)

    # -- building

    def _state(self, *free: int, step: tuple[Characters, int] | None = None) -> int:
        """Add a state from which others are reached freely, or one by a step over a character."""
        self._steps.append(step)
        self._free.append(free)
        return len(self._steps) - 1

    def _build(self, expression: Expression, end: int) -> int:
        """Return the state from which the expression leads to `end`."""
        if isinstance(expression, Characters):
            return self._state(step=(expression, end))
        if isinstance(expression, Choice):
            return self._state(*(self._build(part, end) for part in expression.parts))
        if isinstance(expression, Concatenation):
            return self._chained(expression.parts, end)
        start = end
        if expression.high is None:
            start = self._state(end)
            self._free[start] = (end, self._build(expression.part, start))
        else:
            for _ in range(expression.high - expression.low):
                start = self._state(self._build(expression.part, start), end)
        return self._chained([expression.part] * expression.low, start)

    def _chained(self, parts: Sequence[Expression], end: int) -> int:
        for part in reversed(parts):
            end = self._build(part, end)
        return end
