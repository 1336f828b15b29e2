"""Globs that match some names of a model and none of the others."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_fx.rules.globs import MOST_NUMBERS
from lora_fx.rules.patterns import glob_of

MOST_PATTERNS = 16
"""Beyond which names are told by their ends alone, `**.q_proj`, where that makes fewer."""
_MOST_WORDS = 8
"""In one pair of braces."""
_NUMBER = re.compile(r"[0-9]+")
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_IN_NO_RULE = re.compile(r"[\0\ud800-\udfff]")
Segments = tuple[str, ...]
Part = tuple[str, ...]
"""What one segment may be; nothing stands for anything."""


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern by its segments; of a deep one, any segments may stand before them."""

    parts: tuple[Part, ...]
    deep: bool = False

    def fits(self, segments: Segments) -> bool:
        tail = segments[-len(self.parts) :] if self.deep else segments
        return len(tail) == len(self.parts) and all(
            not part or segment in part for part, segment in zip(self.parts, tail, strict=True)
        )

    def __str__(self) -> str:
        return ".".join([*(["**"] if self.deep else []), *map(_part_text, self.parts)])


def covering(chosen: Sequence[str], others: Iterable[str], most: int = MOST_PATTERNS) -> tuple[str, ...]:
    """Return globs that match all the chosen names and none of the others, few where few will do.

    Numbers that differ become `*`, or `{0..11}` where that would match others too; names that differ in their end
    share braces.
    """
    if not all(chosen):  # the model itself, whose name is empty
        return ("re:^$", *(covering([name for name in chosen if name], others, most) if any(chosen) else ()))
    wanted, rest = ([tuple(name.split(".")) for name in names] for names in (chosen, others))
    globs = list(_joined(_by_numbers(wanted, rest), rest))
    if len(globs) > most:
        globs = min(globs, list(_joined(_by_ends(wanted, rest), rest)), key=len)
    return tuple(map(str, globs))


def template(name: str) -> str:
    """Return a name with every segment that is a number as `*`."""
    return ".".join("*" if _NUMBER.fullmatch(segment) else segment for segment in name.split("."))


def _by_numbers(wanted: Sequence[Segments], rest: Sequence[Segments]) -> Iterator[Glob]:
    """Yield globs for the names that are alike but for their numbers."""
    alike: dict[Segments, list[Segments]] = {}
    for segments in wanted:
        key = tuple("" if _NUMBER.fullmatch(segment) else segment for segment in segments)
        alike.setdefault(key, []).append(segments)
    for names in alike.values():
        columns = [tuple(dict.fromkeys(column)) for column in zip(*names, strict=True)]
        loose = Glob(tuple(() if len(column) > 1 else column for column in columns))
        clean = [glob for glob in (loose, Glob(tuple(columns))) if not any(map(glob.fits, rest))]
        yield from clean[:1] or _one_column(names, columns)


def _one_column(names: Sequence[Segments], columns: Sequence[Part]) -> Iterator[Glob]:
    """Yield globs in which only the first number that differs is open: they match these names and nothing else."""
    at = next((at for at, column in enumerate(columns) if len(column) > 1), 0)
    values: dict[Segments, list[str]] = {}
    for segments in names:
        values.setdefault((*segments[:at], *segments[at + 1 :]), []).append(segments[at])
    for around, numbers in values.items():
        parts = [(segment,) for segment in around]
        yield Glob((*parts[:at], tuple(numbers), *parts[at:]))


def _by_ends(wanted: Sequence[Segments], rest: Sequence[Segments]) -> Iterator[Glob]:
    """Yield globs of the shortest ends of names that no other name has, and that do not begin with a number."""
    ends: dict[int, set[Segments]] = {}
    found: dict[Glob, None] = {}
    for segments in wanted:
        for length in range(1, len(segments) + 1):
            taken = ends.setdefault(length, {other[-length:] for other in rest})
            if segments[-length:] not in taken and not _NUMBER.fullmatch(segments[-length]):
                found[Glob(tuple((segment,) for segment in segments[-length:]), deep=True)] = None
                break
        else:  # the end of a longer name
            found[Glob(tuple((segment,) for segment in segments))] = None
    return iter(found)


def _joined(globs: Iterable[Glob], rest: Sequence[Segments]) -> Iterator[Glob]:
    """Yield the globs with those that differ in their last segment only as one."""
    groups: dict[tuple[tuple[Part, ...], bool], list[Part]] = {}
    for glob in globs:
        groups.setdefault((glob.parts[:-1], glob.deep), []).append(glob.parts[-1])
    for (before, deep), ends in groups.items():
        loose = Glob((*before, ()), deep)
        if len(ends) > _MOST_WORDS and not any(map(loose.fits, rest)):
            yield loose
            continue
        words = [end[0] for end in ends if len(end) == 1 and _PLAIN.fullmatch(end[0])]
        for first in range(0, len(words), _MOST_WORDS):
            yield Glob((*before, tuple(words[first : first + _MOST_WORDS])), deep)
        for end in ends:
            if len(end) != 1 or not _PLAIN.fullmatch(end[0]):
                yield Glob((*before, end), deep)


# -- text


def _part_text(part: Part) -> str:
    if not part:
        return "*"
    if len(part) == 1:
        return _IN_NO_RULE.sub("?", glob_of(part[0]))
    if all(map(_NUMBER.fullmatch, part)):
        return f"{{{','.join(_runs(part))}}}"
    return _braced(part)


def _runs(numbers: Part) -> Iterator[str]:
    """Yield numbers as a rule writes them: 0..3, 7."""
    plain = sorted({int(number) for number in numbers if str(int(number)) == number})
    for _, run in itertools.groupby(enumerate(plain), key=lambda at: (at[1] - at[0], at[1] // MOST_NUMBERS)):
        values = [value for _, value in run]
        yield from [f"{values[0]}..{values[-1]}"] if len(values) > 2 else map(str, values)
    yield from (number for number in numbers if str(int(number)) != number)


def _braced(words: Part) -> str:
    """Return `{q,k}_proj`, `to_{q,k}` or `{query,key}`."""
    bars = [at for at, character in enumerate(words[0]) if character == "_"]
    for end in (words[0][at:] for at in bars):
        if all(word.endswith(end) and word != end for word in words):
            return f"{{{','.join(word.removesuffix(end) for word in words)}}}{end}"
    for start in (words[0][: at + 1] for at in reversed(bars)):
        if all(word.startswith(start) and word != start for word in words):
            return f"{start}{{{','.join(word.removeprefix(start) for word in words)}}}"
    return f"{{{','.join(words)}}}"
