"""One line on a terminal that says how far a call is: it comes late, gives way to all other text, and is erased.

Written with carriage returns and blanks alone, which terminals, notebooks and Windows know alike.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from lora_fx.text import cells, visible

PATIENCE = 2.0
"""Seconds that a call may take before it says anything of itself."""
_OFTEN, _TICK = 0.1, 0.5
"""Seconds between two drawings at least; and at most, while nothing is told."""
_QUARTERS = 4
"""How many lines a call writes at most where lines stay."""
_STREAMS = ("stdout", "stderr")
_LOCK = threading.RLock()
_Told: TypeAlias = Callable[[int, int, str], object]


class _OnTerminal:
    """Which line is on the terminal: one at a time; other calls wait until it is free."""

    line: "Line | None" = None
    ends_line = True
    """Whether what others have written last ended its line."""


def _forget() -> None:
    """In a forked process: the line belongs to its parent, and so may a lock that nobody there gives back."""
    global _LOCK
    _LOCK, _OnTerminal.line = threading.RLock(), None


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)


class _GivingWay:
    """A stream of Python's own, before which the line gives way: warnings and prints stand on lines of their own."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> Any:
        with _LOCK:
            if _OnTerminal.line is not None:
                _OnTerminal.line.erase()
            written = self.stream.write(text)
            _OnTerminal.ends_line = not text or text.endswith("\n")
            return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Line:
    """The line of one call.

    Args:
        name: of the call.
        stream: a terminal, or a notebook's.
        patience: seconds after which it is shown.
        clock: whether a thread draws it anew while nothing is told.
    """

    def __init__(self, name: str, stream: Any, patience: float, clock: bool) -> None:
        self._name, self._text, self._stream = name, name, stream
        self._begun = time.monotonic()
        self._due = self._begun + patience
        self._cells = 0
        self._ended = threading.Event()
        self._clock: threading.Thread | None = None
        if clock:
            self._clock = threading.Thread(target=self._tick, args=(patience,), name="lora_fx progress", daemon=True)
            self._clock.start()

    def __call__(self, done: int, total: int, what: str, /) -> None:
        self._text = _line(self._name, done, total, what)
        if time.monotonic() >= self._due:
            self._draw()

    def _tick(self, patience: float) -> None:
        seconds = max(patience, _TICK)
        while not self._ended.wait(seconds):
            self._draw()
            seconds = _TICK

    def _draw(self) -> None:
        with _LOCK:
            if self._ended.is_set() or _OnTerminal.line not in (None, self):
                return
            if _OnTerminal.line is None:
                _OnTerminal.line, _OnTerminal.ends_line = self, True
                _give_way()
            if _OnTerminal.ends_line:
                text = _fitting(f"{self._text} · {_duration(time.monotonic() - self._begun)}", _columns(self._stream))
                width = cells(text)
                self._write(f"\r{text}{' ' * (self._cells - width)}")
                self._cells = width
            self._due = time.monotonic() + _OFTEN

    def erase(self) -> None:
        """Take the line off the terminal; the next thing that is told brings it back."""
        if self._cells:
            self._write(f"\r{' ' * self._cells}\r")
            self._cells = 0

    def close(self) -> None:
        """Erase the line for good, and let the streams be as they were."""
        self._ended.set()
        with _LOCK:
            if _OnTerminal.line is self:
                self.erase()
                _OnTerminal.line = None
                _take_way()
        if self._clock is not None:
            self._clock.join(timeout=_TICK)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone; the call goes on
            self._stream.write(text)
            self._stream.flush()


class _Lines:
    """What stays: a line after each quarter of a call, for files and pipes."""

    def __init__(self, name: str, stream: Any) -> None:
        self._name, self._stream, self._quarter, self._begun = name, stream, 0, time.monotonic()

    def __call__(self, done: int, total: int, what: str, /) -> None:
        quarter = _QUARTERS * done // total if total else 0
        if quarter > self._quarter:
            self._quarter = quarter
            took = _duration(time.monotonic() - self._begun)
            self._stream.write(f"{_line(self._name, done, total, what)} · {took}\n")
            self._stream.flush()


@contextlib.contextmanager
def shown(name: str, progress: bool | _Told | None, clock: bool) -> Iterator[_Told | None]:
    """Give whom a call is to tell (done, total, what): a line on the standard error, the caller's own, or nobody.

    Args:
        name: of the call.
        progress: as for `lora_fx.plan`.
        clock: as for `Line`.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ValueError(
            f"progress is {progress!r}; it must be None, True, False, or a function of (done, total, what)"
        )
    stream = _own(sys.stderr)
    if callable(progress):
        yield progress
    elif progress is False or stream is None or (progress is None and not _is_watched(stream)):
        yield None
    elif _is_watched(stream):
        line = Line(name, stream, 0.0 if progress else PATIENCE, clock)
        try:
            yield line
        finally:
            line.close()
    else:
        yield _Lines(name, stream)


def _own(stream: Any) -> Any:
    """Return the stream that was there before a line."""
    return stream.stream if isinstance(stream, _GivingWay) else stream


def _is_watched(stream: Any) -> bool:
    """Whether somebody sees the stream as it is written: a terminal, but for logs of CI, or a notebook."""
    if type(stream).__module__.startswith("ipykernel."):
        return True
    if os.environ.get("TERM") == "dumb" or os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # somebody's own class, or closed
        return False


def _give_way() -> None:
    """Let what is written to the same place find no line there."""
    for name in _STREAMS:
        stream = _own(getattr(sys, name))
        if stream is not None and _is_watched(stream):
            setattr(sys, name, _GivingWay(stream))


def _take_way() -> None:
    for name in _STREAMS:
        setattr(sys, name, _own(getattr(sys, name)))


def _line(name: str, done: int, total: int, what: str) -> str:
    parts = [f"{name}: {visible(what)}" if what else name]
    return " · ".join([*parts, f"{100 * done // total} %"] if total else parts)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60} s"


def _columns(stream: Any) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def _fitting(text: str, columns: int) -> str:
    """Return the text, with its middle left out where it would not stay on one line."""
    most = max(columns - 1, 10)
    if cells(text) <= most:
        return text
    end = text[-(most // 3) :]
    while text and cells(text) + cells(end) + 1 > most:
        text = text[:-1]
    return f"{text}…{end}"
