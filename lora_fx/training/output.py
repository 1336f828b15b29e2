"""The file of a record as it is written: what is there already must fit, and what comes is appended.  No torch."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from lora_fx.errors import LONGEST_NAME
from lora_fx.sources.installed import own_version
from lora_fx.sources.regular import UnreadableError, check_path, is_regular, open_regular
from lora_fx.text import shortened
from lora_fx.training.history import RecordedSite, RecordedStep
from lora_fx.training.lines import (
    MOST_LINE_BYTES,
    RecordFileError,
    RecordLines,
    header_line,
    header_of,
    is_beginning,
    step_line,
)

_MOST_NAMED = 8


class RecordOutput:
    """A file to which lines are appended, each whole.  Making one writes nothing.

    It is opened for each line alone: another process may read it, and it may be moved away after the run.
    """

    def __init__(self, path: str | os.PathLike[str], model: str, sites: Sequence[RecordedSite]) -> None:
        """Look at what is there.

        Raises:
            RecordFileError: it cannot be written there, or is no record, or one of another model.
        """
        self.path, self.model, self.sites = os.fspath(path), model, tuple(sites)
        self._size: int | None = None
        """Bytes that this process has left; None before it has written."""
        self._check_place()
        self._header = header_line(self.model, own_version(), self.sites)
        try:
            header_of(self._header)
        except UnreadableError as error:
            raise RecordFileError(f"{self.name}: the record of this model could not be read again: {error}") from error
        self.last = self._past()[0]
        """The last line of a run that goes on."""

    @property
    def name(self) -> str:
        """The path as messages show it."""
        return shortened(self.path, LONGEST_NAME)

    def _check_place(self) -> None:
        try:
            check_path(self.path)
        except UnreadableError as error:
            raise RecordFileError(f"{self.name}: {error}") from error
        place = Path(self.path)
        while not place.exists() and place != place.parent:
            place = place.parent
        if place != Path(self.path) and not place.is_dir():
            raise RecordFileError(f"{self.name}: cannot be written: {place} is not a directory")
        if not os.access(place, os.W_OK):
            raise RecordFileError(f"{self.name}: cannot be written: no permission")

    def _past(self) -> tuple[RecordedStep | None, int]:
        """Return the last line of what is there, and how many bytes of it are whole lines.

        Raises:
            RecordFileError: it is no record, or of another model.
        """
        if not os.path.lexists(self.path) or self._is_only_begun():
            return None, 0
        lines = RecordLines(self.path)
        past = lines.read()
        if (past.model, past.sites) != (self.model, self.sites):
            self._refuse(past.model, past.sites)
        return past.steps[-1] if past.steps else None, lines.size

    def _is_only_begun(self) -> bool:
        """Whether the file is empty, or holds a part of a header and no whole line, as a crash leaves it."""
        try:
            with open_regular(self.path) as file:
                line = file.readline(MOST_LINE_BYTES)
        except UnreadableError as error:
            raise RecordFileError(f"{self.name}: {error}") from error
        return not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES and is_beginning(line)

    def _refuse(self, model: str, sites: Sequence[RecordedSite]) -> None:
        theirs, ours = _told(model, sites), _told(self.model, self.sites)
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)] or ["order of the sites"]
        facts = [
            f"  {name}: file {theirs.get(name, 'has none')}, model {ours.get(name, 'has none')}"
            for name in names[:_MOST_NAMED]
        ]
        more = [f"  … and {len(names) - _MOST_NAMED:,} more"] if len(names) > _MOST_NAMED else []
        head = f"{self.name}: is the record of another model; nothing was written"
        raise RecordFileError("\n".join([head, *facts, *more, "  give each run a file of its own"]))

    def append(self, line: RecordedStep) -> None:
        """Write a line behind the last whole one, the header before the first.

        Raises:
            RecordFileError: it cannot be written, does not fit any more, or something else has written to it.
        """
        if self._size is None:
            self._size = self._past()[1]
        elif (found := os.stat(self.path).st_size if is_regular(self.path) else 0) != self._size:
            raise RecordFileError(
                f"{self.name}: has {found:,} bytes, and this run has left {self._size:,}: something else writes to it"
                "\n  give each run a file of its own"
            )
        head = b"" if self._size else self._header
        try:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._size = _written(self.path, self._size, head + step_line(line))
        except OSError as error:
            raise RecordFileError(f"{self.name}: cannot be written: {error.strerror or error}") from error


def _told(model: str, sites: Sequence[RecordedSite]) -> dict[str, str]:
    """Return what of a record must fit, by name."""
    facts = {site.name: f"r={site.r} scaling={site.scaling:g} rule {site.rule}" for site in sites}
    return {"model": model} | facts


def _written(path: str, size: int, content: bytes) -> int:
    """Write content behind so many bytes of a file, in place of what is there, all of it or nothing; return the end."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        os.ftruncate(handle, size)
        os.lseek(handle, size, os.SEEK_SET)
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(handle, left) :]
        except OSError:  # a full disk: no half line stays
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
    return size + len(content)
