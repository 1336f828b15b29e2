"""Rule files as text: mappings in block style, with names of any characters."""

import re
from collections.abc import Iterator, Mapping, Sequence

Written = bool | str | int | float | Sequence[str] | Mapping[str, "Written"]
_WORD = re.compile(r"(?!(null|true|false|yes|no|on|off)$)[a-z]{2}[a-z-]*")
_LETTER = re.compile(r"[a-mo-xz]")
"""What is the same text in every reading of YAML: `y` and `n` are not."""


def printable(text: str) -> str:
    r"""Return a text with everything that is not plainly seen written out: \x1b, \u202e, \n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """Return a text as a double-quoted scalar of YAML; whatever is not plainly seen is escaped."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def rule_lines(rule: Mapping[str, Written]) -> list[str]:
    """Return a rule as an item of a list in block style: names of patterns are quoted, each on a line of its own."""
    first, *rest = _lines(rule)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _lines(mapping: Mapping[str, Written]) -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield f"{key}:"
            yield from (f"  {line}" for line in _lines(value))
        elif isinstance(value, (str, int, float)):
            yield f"{key}: {_scalar(value)}"
        elif all(map(_LETTER.fullmatch, value)):
            yield f"{key}: [{', '.join(value)}]"
        else:
            yield f"{key}:"
            yield from (f"  - {quoted(item)}" for item in value)


def _scalar(value: str | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else quoted(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
