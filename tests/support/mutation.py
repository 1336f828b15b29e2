"""Valid files, changed: bytes, tokens, values, repetitions, nesting and odd characters, the same for the same seed."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RULES = Path(__file__).parents[2] / "rules"
ODD = [
    "\0",
    "\x07",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\ufffe",
    "é",
    "漢",
    "😀",
    "\u0301",
    "\t",
    "\r",
    "٣",
]
NASTY = [
    *(
        "",
        "~",
        "null",
        "true",
        "yes",
        "0",
        "-1",
        "010",
        "1e400",
        ".nan",
        "-.inf",
        "1e-320",
        "18446744073709551616",
        "0x10",
    ),
    *("1" * 400, "0" * 50 + "1", "**", "**.a**", "re:(a{1000}){1000}", "re:(", "re:[z-a]", "re:a{99999}", "{0..9999}"),
    *(
        "{1..99999999999999999999}",
        "{" * 70,
        "[a-",
        "[!]",
        "a..b",
        "\\",
        "3*d",
        ">=0",
        "1..2",
        "9999999999999999999..1",
    ),
    *(
        "!!python/name:os.system",
        "!a b",
        "&x y",
        "*x",
        "<<: *x",
        "- - - -",
        "? a",
        "|",
        ">",
        "@",
        "`",
        "%",
        "---",
        "...",
    ),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x41"',
        "'",
        '"',
        "{a: b}",
        "[1, 2",
        "name",
        "match",
        "lora",
        "version",
        "of",
        "x" * 3000,
    ),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        1.5,
        2**31,
        2**63,
        10**400,
        1e308,
        5e-324,
        float("nan"),
        float("inf"),
        "",
        "a",
        "\0",
    ),
    *("adapt", "keep", "x" * 5000, "../a", "a\nb", "\u202e", [], [[]], [0], [1, -1], [2**62, 4], [None], {}, {"a": 1}),
    *("linear", "experts", "in_out", "graph", "$9", "$" + "9" * 30, [0, 0, 0], {"r": 0}, "h.0.c_fc", "float8", 65536),
]
_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
EXTRA = """\
version: 1
defaults: &d {r: 4, alpha: 8, dropout: 0.1, init: orthogonal, dora: false, bias: true}
rules:
  - &one {name: a, match: {name: ["**.{q,v}_proj", "re:(h|l)\\\\.[0-9]{1,3}\\\\.\\\\w+", "[a-c]?.{0..11}"], op: linear}, lora: *d}
  - {name: b, match: {shape: [3*d, ">=8", 1..64], class: [Linear, "*.Conv*"]}, slices: {of: {q: 0..4, k: [4..6, 8..9]}, adapt: [q]}}
  - name: c
    match: {name: "**"}
    skip: |
      because
    expect: any
  - {match: {op: [embedding, conv2d]}, per_call: true, lora: {adapter: style, r: 2}, expect: 3}
train: ["head", "**.norm*"]
"""


_SMALL = """\
version: 1
rules: [{match: {name: "**.{q,v}_proj"}, lora: {r: 8, alpha: 16}}]
===
version: 1
rules:
  - match: {shape: [3*d, d], op: linear}
    slices: {of: [q, k, v], adapt: [q, v]}
===
version: 1
defaults: {r: 4, dropout: 0.1}
rules:
  - {name: a, match: {name: "re:h\\\\.[0-9]+\\\\.(fc|wte)"}, expect: any}
  - {name: b, match: {class: Linear}, skip: "because"}
train: ["head"]
===
version: 1
rules: [{match: {name: "**.q_proj"}}]
tokens: [{name: wte, ids: [2, 7, 9..12], adapter: default}]
bias: all
"""


def seeds_of_rules() -> list[str]:
    """Return valid rule files: most of them short, since a case should take less than a millisecond."""
    shipped = (RULES / f"{name}.yaml" for name in ("mlp", "wide"))
    return [*_SMALL.split("===\n") * 4, EXTRA, *(path.read_text(encoding="utf-8") for path in shipped)]


def mutated_text(draw: random.Random, seeds: Sequence[str]) -> bytes:
    """Return a text with one to four changes."""
    text = draw.choice(seeds)
    for _ in range(draw.choice((1, 1, 2, 4))):
        text = draw.choice(_CHANGES)(draw, text)
    content = text.encode("utf-8", "surrogatepass")
    return _bytes(draw, content) if draw.random() < 0.15 else content


def _bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    new = draw.choice((b"", draw.randbytes(draw.randint(1, 4)), b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80"))
    return content[:at] + new + content[at + draw.randint(0, 3) :]


def _tokens(draw: random.Random, text: str) -> str:
    """Return the text with a token replaced, taken away, doubled, or exchanged with another."""
    tokens = _TOKEN.findall(text)
    if not tokens:
        return draw.choice(NASTY)
    at, other = draw.randrange(len(tokens)), draw.randrange(len(tokens))
    tokens[at] = draw.choice((draw.choice(NASTY), "", tokens[at] * 2, tokens[other], draw.choice(ODD)))
    return "".join(tokens)


def _lines(draw: random.Random, text: str) -> str:
    """Return the text with a line repeated, taken away, moved, or set in or out."""
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    line = lines[at]
    new = draw.choice(
        ([], [line] * draw.choice((2, 3, 40)), [" " + line], [line[1:]], [line, draw.choice(lines)], ["\t" + line])
    )
    lines[at : at + 1] = new
    return "\n".join(lines)


def _nested(draw: random.Random, text: str) -> str:
    """Return the text with something in it put deeper."""
    at, depth = draw.randrange(len(text) + 1), draw.choice((1, 3, 19, 25, 60))
    opened, closed = draw.choice((("[", "]"), ("{a: ", "}"), ("{", "}"), ("(", ")"), ("- ", "")))
    return text[:at] + opened * depth + text[at : at + 5] + closed * depth + text[at + 5 :]


def _characters(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    return text[:at] + draw.choice(ODD) * draw.choice((1, 1, 30)) + text[at + draw.randint(0, 2) :]


def _aliases(draw: random.Random, text: str) -> str:
    """Return the text with an alias in the place of a word, and perhaps the anchor in that of another."""
    words = list(re.finditer(r"(?<=[\[ ,])\w+", text))
    if not words:
        return text
    word = draw.choice(words)
    return text[: word.start()] + draw.choice(("*d", "*one", "&d ", "*none", "&one ")) + text[word.end() :]


_CHANGES = (_tokens, _tokens, _tokens, _lines, _lines, _nested, _characters, _aliases)


def mutated_document(draw: random.Random, document: Any, text: str) -> str:
    """Return JSON with one to three of its values changed, added, repeated or taken away; or its text changed."""
    if draw.random() < 0.15:
        return mutated_text(draw, [text]).decode("utf-8", "replace")
    changed = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(draw, changed)
    return json.dumps(changed)


def _change(draw: random.Random, inner: Any) -> None:
    """Change one place in a document: down to a leaf, or to a part on the way."""
    while True:
        key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        deeper = isinstance(inner[key], (dict, list)) and len(inner[key]) > 0
        if not deeper or draw.random() < 0.1:
            break
        inner = inner[key]
    what = draw.random()
    if what < 0.1:
        del inner[key]
    elif what < 0.2 and isinstance(inner, list):
        inner[key:key] = [copy.deepcopy(inner[key])] * draw.choice((1, 2, 30))
    elif what < 0.25 and isinstance(inner, dict):
        inner[draw.choice(("unknown", "path", "r", "a\0b"))] = draw.choice(VALUES)
    elif what < 0.45 and type(inner[key]) in (int, float):
        inner[key] = inner[key] + draw.choice((1, -1, 1000, 2**40))
    else:
        inner[key] = copy.deepcopy(draw.choice(VALUES))
