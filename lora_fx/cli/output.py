"""Where text goes: to a file, to a terminal within its width and in colours."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from lora_fx.text import MARKED, visible, wrapped

_STYLES: dict[str, dict[str, Any]] = {
    "title": {"bold": True},
    "place": {"fg": "cyan"},
    "added": {"fg": "green"},
    "removed": {"fg": "red"},
    "skipped": {"fg": "yellow"},
}


def terminal_width() -> int | None:
    """Return the width of the terminal that will show the output; None where it goes to a file or a pipe.

    COLUMNS, where it is set, says so for both.
    """
    if not (sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()):
        return None
    return shutil.get_terminal_size().columns


def write(text: str, output: str = "-", form: str = "text") -> None:
    """Write the text to a file, or show it: within the terminal's width, and in colours where it has them.

    What is not seen (control characters of names) is written out, in every format.
    """
    text = visible(text, kept="\n\t")
    if output == "-" and form == "text":
        show(wrapped(text, terminal_width()))
    elif output == "-":
        click.echo(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")


def show(text: str) -> None:
    """Show a text in colours, unless it goes to a file or the environment says NO_COLOR."""
    wanted = not os.environ.get("NO_COLOR") and (bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty())
    click.echo(painted(text) if wanted else text, color=wanted)


def painted(text: str) -> str:
    """Return the text with what is added in green, what is taken away or refused in red, skipped in yellow."""
    for pattern, kind in MARKED:
        start, end = click.style("\0", **_STYLES[kind]).split("\0")
        text = pattern.sub(rf"{start}\g<0>{end}", text)
    return text
