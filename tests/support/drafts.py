"""Reads drafts of rule files: the parts that stand ready as comments, and the file with one of them switched on."""

from __future__ import annotations

import re
from dataclasses import dataclass

_OFF = re.compile(r"( *)# (.*)")
_BEGINS = re.compile(r"- name: (\S+)")
_NUMBER = re.compile(r"## .*?([\d,]+) of [\d,]+ parameters")


@dataclass(frozen=True)
class Part:
    """Lines that belong together and are switched off."""

    name: str
    lines: tuple[int, ...]
    instead: bool
    """Whether it is meant in place of the rule that is active."""
    said: int | None
    """How many parameters the remark above it says."""


def parts_of(text: str) -> list[Part]:
    """Return the parts of a draft that can be switched on, each by itself."""
    parts: list[Part] = []
    instead, said, gap = False, None, True
    for at, line in enumerate(text.splitlines()):
        off = _OFF.fullmatch(line)
        if off is None:
            if line.lstrip().startswith("## ----"):
                instead = "In place of" in line
            elif number := _NUMBER.search(line):
                said = int(number[1].replace(",", ""))
            gap = gap or not line
            continue
        if off[2].startswith(" ") or (not gap and parts and off[2].startswith("- ")):
            last = parts.pop()
            parts.append(Part(last.name, (*last.lines, at), last.instead, last.said))
        else:
            named = _BEGINS.match(off[2])
            is_rule = named is not None
            name = named[1] if named else off[2].partition(":")[0]
            parts.append(Part(name, (at,), instead and is_rule, said if is_rule else None))
        gap = False
    return parts


def switched_on(text: str, part: Part) -> str:
    """Return the draft with one part switched on, and the active rule off if the part takes its place."""
    lines = text.splitlines()
    if part.instead:
        start = lines.index("rules:") + 1
        first = next(at for at in range(start, len(lines)) if lines[at].startswith("  - "))
        end = next(at for at in range(first + 1, len(lines)) if not lines[at].startswith("    "))
        lines[first:end] = [f"## {line}" for line in lines[first:end]]
    for at in part.lines:
        lines[at] = _OFF.sub(r"\1\2", lines[at])
    return "\n".join(lines) + "\n"
