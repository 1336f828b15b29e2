"""Nothing is seen of an export until all of it is there: files are written aside and moved into place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lora_fx.errors import ExportError
from lora_fx.files import atomic
from lora_fx.files.atomic import files_in


@contextlib.contextmanager
def staged(target: str, path: Path) -> Iterator[Path]:
    """Give a path of the same name in a fresh directory beside; at the end, move all that is in there into place.

    An existing directory is written into only if nothing of it would stay: files of another export among the new ones
    would be read with them.

    Raises:
        ExportError: the path cannot be written, or is a directory with something else in it.
    """

    def refuse_mixing(new: Path, old: Path) -> None:
        if not old.exists() or (new.is_file() and old.is_file()):
            return
        if new.is_dir() != old.is_dir():
            raise ExportError(target, f"{old} is there already, and is {'a directory' if old.is_dir() else 'a file'}")
        foreign = sorted(str(name) for name in files_in(old) - files_in(new))
        if foreign:
            facts = [(name,) for name in foreign[:6]]
            raise ExportError(target, f"{old} holds other files", facts, "choose another path")

    try:
        with atomic.staged(path, refuse_mixing) as stage:
            yield stage
    except OSError as error:
        raise ExportError(target, f"{path} cannot be written: {error.strerror or error}") from error
