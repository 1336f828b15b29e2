"""Rule files as text: mappings in block style, with names of any characters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Written = bool | str | int | float | Sequence[str | int] | Mapping[str, "Written"]
_WORD = re.compile(r"(?!(null|true|false|yes|no|on|off)$)[a-z]{2}[a-z-]*")
_LETTER = re.compile(r"[a-mo-xz]")
"""What is the same text in every reading of YAML: `y` and `n` are not."""
_KEY = re.compile(r"(?!(y|n|yes|no|on|off|true|false|null)$)[a-z][a-z0-9_-]*")


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


def rule_file(document: Mapping[str, Any], remarks: str = "") -> str:
    """Return the text of a rule file, which is read as the same document; remarks stand before it."""
    lines = [f"## {printable(line)}".rstrip() for line in remarks.splitlines()]
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{key}:", *(f"  {line}" for rule in value for line in rule_lines(rule))]
        else:
            lines += _lines({key: value})
    return "\n".join(lines) + "\n"


def _lines(mapping: Mapping[str, Written]) -> Iterator[str]:
    for name, value in mapping.items():
        key = name if _KEY.fullmatch(name) else quoted(name)
        if isinstance(value, Mapping):
            yield f"{key}:"
            yield from (f"  {line}" for line in _lines(value))
        elif isinstance(value, (str, int, float)):
            yield f"{key}: {_scalar(value)}"
        elif all(isinstance(item, str) and _LETTER.fullmatch(item) for item in value):
            yield f"{key}: [{', '.join(map(str, value))}]"
        else:
            yield f"{key}:"
            yield from (f"  - {quoted(item) if isinstance(item, str) else _scalar(item)}" for item in value)


def _scalar(value: str | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else quoted(value)
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Return a number that every reading of YAML reads as this one: 1e-05 would be a text there, 1.0e-05 is none.

    >>> [_number(value) for value in (16.0, 4 * 2 / 3, 1e-5, 1e9)]
    ['16', '2.6666666666666665', '1.0e-05', '1000000000']
    """
    if value.is_integer():
        return str(int(value))
    mantissa, e, exponent = repr(value).partition("e")
    return f"{mantissa}.0{e}{exponent}" if e and "." not in mantissa else f"{mantissa}{e}{exponent}"
