"""Matching in linear time: an expression becomes a nondeterministic automaton, simulated with a bounded memory.

No expression can blow up on a hostile name: every character costs at most one step through the automaton's states, and
usually one look-up.  Source: Thompson 1968, doi:10.1145/363347.363387; the lazily built deterministic automaton is
that of RE2 (Cox 2010).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

MOST_STATES = 50_000
"""More than these (`states_of`) should be refused, not expanded: `{2,1000}` inside `{2,1000}`."""
_MOST_REMEMBERED = 2_000


@dataclass(frozen=True, slots=True)
class Characters:
    """One character out of the ranges (inclusive), or out of all others."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool = False

    def accepts(self, character: str) -> bool:
        return any(low <= character <= high for low, high in self.ranges) != self.negated


ANY = Characters((), negated=True)
NOT_DOT = Characters(((".", "."),), negated=True)


@dataclass(frozen=True, slots=True)
class Concatenation:
    """The parts one after another."""

    parts: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the parts."""

    parts: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class Repeat:
    """The part at least `low` times, at most `high` times; None = any number."""

    part: "Expression"
    low: int = 0
    high: int | None = None


Expression = Characters | Concatenation | Choice | Repeat


def literal(text: str) -> Concatenation:
    """Return the expression that only this text matches."""
    return Concatenation(tuple(Characters(((character, character),)) for character in text))


def states_of(expression: Expression) -> int:
    """Return about how many states the expression's automaton has."""
    if isinstance(expression, Characters):
        return 1
    if isinstance(expression, Repeat):
        return states_of(expression.part) * max(expression.low + 1, expression.high or 0) + 1
    return 1 + sum(map(states_of, expression.parts))


class Automaton:
    """A compiled expression."""

    def __init__(self, expression: Expression) -> None:
        self._steps: list[tuple[Characters, int] | None] = []
        self._free: list[list[int]] = []
        self._end = self._state()
        start = self._build(expression, self._end)
        self._start = self._closure([start])
        self._after = functools.lru_cache(_MOST_REMEMBERED)(self._advance)
        self.work = 0
        """States visited so far; what tests count instead of time."""

    def matches(self, text: str) -> bool:
        """Whether the whole text matches."""
        states = self._start
        for character in text:
            states = self._after(states, character)
            if not states:
                return False
        return self._end in states

    def _advance(self, states: frozenset[int], character: str) -> frozenset[int]:
        self.work += len(states)
        return self._closure(
            [step[1] for state in states if (step := self._steps[state]) and step[0].accepts(character)]
        )

    def _closure(self, states: Sequence[int]) -> frozenset[int]:
        """Return the states and all that are reached from them without a character."""
        waiting, reached = list(states), set(states)
        while waiting:
            following = set(self._free[waiting.pop()]) - reached
            reached |= following
            waiting += following
        return frozenset(reached)

    # -- building

    def _state(self, *free: int, step: tuple[Characters, int] | None = None) -> int:
        """Add a state from which others are reached freely, or one by a step over a character."""
        self._steps.append(step)
        self._free.append(list(free))
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
            self._free[start].append(self._build(expression.part, start))
        else:
            for _ in range(expression.high - expression.low):
                start = self._state(self._build(expression.part, start), end)
        return self._chained([expression.part] * expression.low, start)

    def _chained(self, parts: Sequence[Expression], end: int) -> int:
        for part in reversed(parts):
            end = self._build(part, end)
        return end
