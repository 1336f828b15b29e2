"""A terminal to write to, and what somebody sees on it."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import termios
from collections.abc import Iterator
from types import SimpleNamespace

import pytest


def seen(written: str) -> list[str]:
    """Return the lines on a terminal after a text: `\\r` leads to the beginning of a line, whose cells are overwritten."""
    lines, column = [[]], 0
    for character in written:
        if character == "\n":
            lines, column = [*lines, []], 0
        elif character == "\r":
            column = 0
        else:
            assert character.isprintable(), f"control code {character!r}"
            lines[-1] += [" "] * (column - len(lines[-1]))
            lines[-1][column : column + 1] = [character]
            column += 1
    return ["".join(line).rstrip() for line in lines]


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Iterator[SimpleNamespace]:
    """Let the standard error be a terminal of so many columns; what was `written` to it is there at the end."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    told = SimpleNamespace(written="")
    with os.fdopen(slave, "w", encoding="utf-8", newline="") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        told.stream = stream
        yield told
        os.set_blocking(master, False)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(master, 1 << 16):
                told.written += part.decode().replace("\r\n", "\n")
    os.close(master)
