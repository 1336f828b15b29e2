"""Text for people: aligned columns, carets, suggestions.  Knows nothing of LoRA and imports nothing of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def columns(rows: Sequence[Sequence[str]], indent: str = "  ", gap: str = "  ") -> str:
    """Return the rows as left-aligned columns, one line each, without trailing blanks."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = (gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)


def caret(source_line: str, line: int, column: int, length: int = 1) -> str:
    """Return a numbered source line with carets under `length` characters from `column` (both count from 1)."""
    gutter = f"{line:>5} | "
    lead = "".join("\t" if character == "\t" else " " for character in source_line[: column - 1])
    length = max(1, min(length, max(1, len(source_line) - column + 1)))
    return f"{gutter}{source_line}\n{' ' * (len(gutter) - 2)}| {lead}{'^' * length}"


def nearest(word: str, known: Iterable[str], most: int = 3) -> tuple[str, ...]:
    """Return up to `most` of the known words that look like `word`, the nearest first."""
    return tuple(difflib.get_close_matches(word, list(known), n=most, cutoff=0.6))


def listing(words: Iterable[str], most: int = 6) -> str:
    """Return 'a, b, c', cut after `most` words with the number of those left out."""
    items = list(words)
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} … and {len(items) - most} more"


def count(number: int, noun: str) -> str:
    """Return '1 site' or '12 sites'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def thousands(number: int) -> str:
    """Return the number with thin groups: 1,234,567."""
    return f"{number:,}"
