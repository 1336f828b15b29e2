"""Runs the code of the documentation, and writes its outputs: `python -m tests.support.docpages` brings them up to date.

In a page, ```python blocks run one after another in one namespace; a ```text block behind one is what it prints.
A ```yaml block behind the name of a file and a colon is that file.  ```console blocks show `$ lora-fx …` commands with
the beginning of what they print.  `<!-- keys: TABLE -->` is followed by the table of the rule file's keys,
`<!-- targets -->` by those of export targets, `<!-- rows of PEFT -->` by what becomes of its own list of test models.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_fx.rules import keys

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_KEYS = re.compile(r"<!-- keys: (\w+) -->\n.*?<!-- end -->", re.DOTALL)

_TARGETS = re.compile(r"<!-- targets -->\n.*?<!-- end -->", re.DOTALL)
_ROWS = re.compile(r"<!-- rows of PEFT -->\n.*?<!-- end -->", re.DOTALL)
_NAMED = re.compile(r"`([\w-]+\.yaml)`:\n\n```yaml\n\Z")
_SIGNS = {"yes": "✓", "exact equivalent": "=", "refused": "✗"}


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    start: int
    end: int


def blocks_of(page: str) -> list[Block]:
    return [Block(match[1], match[2], match.start(2), match.end(2)) for match in _BLOCK.finditer(page)]


def differences(page: str) -> Iterator[tuple[Block, str]]:
    """Yield (block, what it should say) for every shown output that is not what really comes out."""
    blocks, scope, printed = blocks_of(page), {"__name__": "page"}, ""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in blocks:
            if block.language == "python":
                printed = _printed(block.text, scope)
            elif block.language == "text" and block.text != printed:
                yield block, printed
            elif block.language == "yaml" and (named := _NAMED.search(page[: block.start])):
                Path(named[1]).write_text(block.text, encoding="utf-8")
            elif block.language == "console":
                shown = _console(block.text)
                if shown != block.text:
                    yield block, shown


def _printed(code: str, scope: dict) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<page>", "exec"), scope)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _console(text: str) -> str:
    """Return the commands with as many lines of their outputs as are shown."""
    from click.testing import CliRunner

    from lora_fx.cli import main

    shown = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *lines = part.splitlines()
        words = command.split()
        shown.append(f"$ {command}")
        if words[0] == "lora-fx":
            with contextlib.chdir(ROOT):
                result = CliRunner(env={"COLUMNS": None}).invoke(main, words[1:])
            output = [line.rstrip() for line in (result.stdout + result.stderr).splitlines()]
            shown += output[: len(lines)] if lines else output
        else:
            shown += lines
    return "\n".join(shown) + "\n"


def with_keys(page: str) -> str:
    """Return the page with its tables as rules, export targets and rows of PEFT have them."""
    page = _TARGETS.sub(lambda _: f"<!-- targets -->\n\n{_capabilities()}\n\n<!-- end -->", page)
    if _ROWS.search(page):
        from tests.support.peftrows import table

        page = _ROWS.sub(lambda _: f"<!-- rows of PEFT -->\n\n{table()}\n\n<!-- end -->", page)
    return _KEYS.sub(lambda match: f"<!-- keys: {match[1]} -->\n\n{_table(match[1])}\n\n<!-- end -->", page)


def _table(name: str) -> str:
    rows = ["| key | means | example |", "|---|---|---|"]
    for key, row in vars(keys)[name].keys.items():
        needed = " Required." if row.required else ""
        rows.append(f"| `{key}` | {row.about}{needed} | `{row.example}` |")
    return "\n".join(rows)


def _capabilities() -> str:
    """Return what each target of ours writes and takes, and the table of what each expresses."""
    from lora_fx.exporters import BUILT_IN, FEATURES, names, target_named

    targets = [target_named(name) for name in names() if name in BUILT_IN]
    rows = ["| target | writes | verified in | needs | options |", "|---|---|---|---|---|"]
    for target in targets:
        options = "<br>".join(f"`{key}`: {about}" for key, about in target.options.items())
        extra = f"`lora-fx[{target.extra}]`" if target.extra else ""
        client = target.client if target.verify else ""
        rows.append(f"| `{target.name}` | {target.writes} | {client} | {extra} | {options} |")
    rows += ["", f"| | {' | '.join(f'`{target.name}`' for target in targets)} |", f"|---|{'---|' * len(targets)}"]
    for feature, words in FEATURES.items():
        rows.append(f"| {words} | {' | '.join(_SIGNS[target.expresses[feature]] for target in targets)} |")
    return "\n".join([*rows, "", "✓ as it is, = in an exact equivalent, ✗ refused with the reason."])


def updated(page: str) -> str:
    """Return the page with outputs and tables as they really are."""
    page = with_keys(page)
    for block, right in sorted(differences(page), key=lambda pair: -pair[0].start):
        page = page[: block.start] + right + page[block.end :]
    return page


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        new = updated(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"updated {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
