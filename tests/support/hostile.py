"""Rule files of about n characters whose kind once took time or memory that grew faster than they do."""

from __future__ import annotations

from collections.abc import Callable

HEAD = "version: 1\nrules:\n"


def _times(unit: str, n: int) -> str:
    """Return so many numbered copies of a unit that they have about n characters."""
    return "".join(unit.replace("#", f"{number:05}") for number in range(n // (len(unit) + 4 * ("#" in unit))))


def _named(pattern: str) -> str:
    return f'{HEAD}  - {{match: {{name: "{pattern}"}}}}\n'


def _sliced(of: str, adapt: str) -> str:
    return f"{HEAD}  - {{match: {{name: a}}, slices: {{of: {of}, adapt: [{adapt}]}}}}\n"


def _bomb(n: int) -> str:
    """Return aliases of aliases: each line has ten times as many entries as the one before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 4)]
    return "\n".join([*lines, f"b: [{', '.join(['*a2'] * (n // 200))}]", "rules: *a3", "version: 1"])


KINDS: dict[str, Callable[[int], str]] = {
    "one key again and again": lambda n: _times("k: 1\n", n),
    "many keys": lambda n: _times("k#: 1\n", n),
    "keys that are no strings": lambda n: "{" + _times("#: 1, ", n) + "}",
    "keys that are lists": lambda n: "{" + _times("[a]: 1, ", n) + "}",
    "merge keys": lambda n: "a: &a {b: 1}\n" + _times("<<: *a\n", n),
    "rules": lambda n: HEAD + _times("  - {name: a#, match: {name: b#}}\n", n),
    "rules of one name": lambda n: HEAD + _times("  - {name: a, match: {name: b#}}\n", n),
    "rules that match the same": lambda n: HEAD + _times("  - {name: a#, match: {name: b}}\n", n),
    "rules with keys that are unknown": lambda n: HEAD + _times("  - {nmae: 1, mtach: 2}\n", n),
    "names that are no patterns": lambda n: HEAD + f"  - match: {{name: [{_times('a..#, ', n)}x]}}\n",
    "operations that are unknown": lambda n: HEAD + f"  - match: {{op: [{_times('linaer#, ', n)}linear]}}\n",
    "sizes that are none": lambda n: HEAD + f"  - match: {{shape: [{_times('big#, ', n)}1]}}\n",
    "aliases of aliases": _bomb,
    "aliases of a long name": lambda n: HEAD + f"  - &r {{match: {{name: a}}, name: {'x' * (n // 2)}}}\n" + _times("  - *r\n", n // 2),
    "aliases of a long key": lambda n: HEAD + f"  - &r {{match: {{name: a}}, ? {'x' * (n // 2)} : 1}}\n" + _times("  - *r\n", n // 2),
    "anchors": lambda n: "[" + _times("&a# x, ", n) + "]",
    "a long anchor": lambda n: f"&{'a' * n} x",
    "a long alias": lambda n: "*" + "a" * n,
    "a long tag": lambda n: f"!{'a' * n} x",
    "lists in lists": lambda n: "[" * n,
    "blocks in blocks": lambda n: "- " * (n // 2),
    "digits": lambda n: "version: " + "1" * n,
    "leading zeros": lambda n: "version: [" + _times("01,", n) + "]",
    "a long exponent": lambda n: "version: 1e" + "1" * n,
    "a long name": lambda n: _named("x" * n),
    "dots": lambda n: _named("a" + ".a" * (n // 2)),
    "stars": lambda n: _named("**" + ".a.**" * (n // 5)),
    "braces": lambda n: _named("{" * n),
    "braces in braces": lambda n: _named("{a," * (n // 4) + "}" * (n // 4)),
    "braces beside braces": lambda n: _named("{a,b}" * (n // 5)),
    "ranges of numbers": lambda n: _named("{0..9999}" * (n // 9)),
    "patterns with ranges": lambda n: HEAD + _times('  - match: {name: "{0..9999}{0..9999}#"}\n', n),
    "brackets": lambda n: _named("[" * n),
    "a long bracket": lambda n: _named("[" + "ab-z" * (n // 4) + "]"),
    "groups": lambda n: _named("re:" + "(" * n),
    "alternatives": lambda n: _named("re:" + "a|" * (n // 2) + "a"),
    "a long count": lambda n: _named("re:a{" + "1" * n + "}"),
    "counts": lambda n: HEAD + _times('  - match: {name: "re:(a{1000}){40}#"}\n', n),
    "a long size": lambda n: f"{HEAD}  - match: {{shape: ['1{' ' * n}2']}}\n",
    "long rows": lambda n: _sliced("{q: '" + "1" * n + "', k: 1..2}", "q"),
    "parts": lambda n: _sliced("[" + _times("q#, ", n // 2) + "]", _times("q#, ", n // 2)),
    "parts that are missing": lambda n: _sliced("[" + _times("q#, ", n // 2) + "]", _times("r#, ", n // 2)),
    "parts with the same rows": lambda n: _sliced("{" + _times("q#: 1..4, ", n) + "}", "q00001"),
    "modules": lambda n: HEAD + f"  - match: {{name: a}}\ntrain: [{_times('a#, ', n)}x]\n",
    "an error at the end of a long line": lambda n: "{a: [" + _times("x, ", n) + "}",
    "a quote that is not closed": lambda n: 'a: "' + "x\n " * (n // 3),
    "odd characters": lambda n: "a: " + "\u0301" * n + ": b",
    "documents": lambda n: _times("---\n", n),
    "tag directives": lambda n: _times("%TAG !a#! tag:x\n", n) + "---\na: 1\n",
}  # fmt: skip
