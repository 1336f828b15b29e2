"""Text for people: aligned columns, carets, suggestions.  Knows nothing of LoRA and imports nothing of ours."""

import difflib
import json
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that are not seen but do something: controls, marks that turn the direction, half ones."""
MARKED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^(\+\+\+|---) .*", re.MULTILINE), "title"),
    (re.compile(r"^@@ .* @@$", re.MULTILINE), "place"),
    (re.compile(r"^\+(?!\+\+ ).*", re.MULTILINE), "added"),
    (re.compile(r"^-(?!-- ).*", re.MULTILINE), "removed"),
    (re.compile(r"(?<=  )\+ r=.*?(?=  |$)", re.MULTILINE), "added"),
    (re.compile(r"(?<=  )! refused.*", re.MULTILINE), "removed"),
    (re.compile(r"(?<=  )· skipped.*", re.MULTILINE), "skipped"),
)
"""What stands out in the texts of plans and diffs, on terminals too, and as what."""


def visible(text: str, kept: str = "") -> str:
    r"""Return the text with what is not seen written out: \x1b, \u202e, \n; what is `kept` stays."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in kept and unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )


def json_text(document: object, **layout: Any) -> str:
    """Return a document as JSON in which whatever is not seen, and all that is not ASCII, is written out."""
    return json.dumps(document, **layout).replace("\x7f", "\\u007f")


def columns(rows: Sequence[Sequence[str]], indent: str = "  ", gap: str = "  ") -> str:
    """Return the rows as left-aligned columns, one line each, without trailing blanks; cells are made visible."""
    if not rows:
        return ""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = (gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)


WIDEST_LINE = 100


def caret(source_line: str, line: int, column: int, length: int = 1) -> str:
    """Return a numbered source line with carets under `length` characters from `column` (both count from 1).

    Of a long line only what surrounds the column is shown.
    """
    gutter = f"{line:>5} | "
    shown, column = _around(source_line, column)
    before, marked, after = (
        visible(part, kept="\t")
        for part in (shown[: column - 1], shown[column - 1 : column - 1 + length], shown[column - 1 + length :])
    )
    shown = before + marked + after
    lead = "".join("\t" if character == "\t" else " " * _width(character) for character in before)
    return f"{gutter}{shown}\n{' ' * (len(gutter) - 2)}| {lead}{'^' * max(1, cells(marked))}"


def _around(line: str, column: int) -> tuple[str, int]:
    """Return the part of a long line around a column, and the column in it."""
    start = max(0, min(column - WIDEST_LINE // 2, len(line) - WIDEST_LINE))
    end = start + WIDEST_LINE
    before, after = "…" if start else "", "…" if end < len(line) else ""
    return f"{before}{line[start:end]}{after}", column - start + len(before)


def _width(character: str) -> int:
    """Return how many cells of a terminal a character takes."""
    if unicodedata.combining(character) or unicodedata.category(character) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    return sum(map(_width, text))


def nearest(word: str, known: Iterable[str], most: int = 3) -> tuple[str, ...]:
    """Return up to `most` of the known words that look like `word`, the nearest first."""
    return tuple(difflib.get_close_matches(word, list(known), n=most, cutoff=0.6))


def listing(words: Iterable[str], most: int = 6) -> str:
    """Return 'a, b, c', cut after `most` words with the number of those left out."""
    items = [visible(word) for word in words]
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} … and {len(items) - most} more"


def shortened(text: str, most: int = 100) -> str:
    """Return a text, or the beginning and the end of a long one."""
    return text if len(text) <= most else f"{text[: most - most // 4 - 1]}…{text[-(most // 4) :]}"


def dotted(*parts: str) -> str:
    """Return a dotted name; the root's path is empty."""
    return ".".join(filter(None, parts))


def count(number: int, noun: str) -> str:
    """Return '1 site' or '12 sites'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def thousands(number: int) -> str:
    """Return the number with thin groups: 1,234,567."""
    return f"{number:,}"


def share_of_parameters(trained: int, total: int) -> str:
    """Return `74,498 of 22,713,986 parameters (0.33 %)`."""
    return f"{thousands(trained)} of {thousands(total)} parameters ({percent(trained, total)})"


def percent(part: int, whole: int) -> str:
    """Return `0.33 %`, of two digits below 100 %; of nothing any share is `0 %`."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2g} %" if share < 99.5 else f"{share:.0f} %"


def scaled(number: int, unit: str) -> str:
    """Return `512 B`, `3.24 kB`, `1.5 GB`."""
    for prefix, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number} {unit}"


def wrapped(text: str, width: int | None) -> str:
    """Return the text with longer lines broken at blanks, their rest indented; None leaves all lines as they are."""
    if width is None:
        return text
    return "\n".join(_wrapped_line(line, max(width, 20)) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    margin = min(len(line) - len(line.lstrip(" +-")), width // 4)
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=" " * (margin + 4), break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip
    return "\n".join(wrapper.wrap(line))
