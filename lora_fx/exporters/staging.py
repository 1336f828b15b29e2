"""Nothing is seen of an export until all of it is there: files are written aside and moved into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_fx.errors import ExportError


@contextlib.contextmanager
def staged(target: str, path: Path) -> Iterator[Path]:
    """Give a path of the same name in a fresh directory beside; at the end, move all that is in there into place.

    An existing directory is written into only if nothing of it would stay: files of another export among the new ones
    would be read with them.

    Raises:
        ExportError: the path cannot be written, or is a directory with something else in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield stage / path.name
        written = sorted(stage.iterdir())
        for each in written:
            _refuse_mixing(target, each, path.parent / each.name)
        _sync(stage)
        for each in written:
            _place(each, path.parent / each.name)
    except OSError as error:
        raise ExportError(target, f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _files(folder: Path) -> set[Path]:
    return {each.relative_to(folder) for each in folder.rglob("*") if not each.is_dir()}


def _refuse_mixing(target: str, new: Path, old: Path) -> None:
    if not old.exists() or (new.is_file() and old.is_file()):
        return
    if new.is_dir() != old.is_dir():
        raise ExportError(target, f"{old} is there already, and is {'a directory' if old.is_dir() else 'a file'}")
    foreign = sorted(str(each) for each in _files(old) - _files(new))
    if foreign:
        raise ExportError(target, f"{old} holds other files", [(each,) for each in foreign[:6]], "choose another path")


def _place(new: Path, old: Path) -> None:
    if new.is_file() or not old.is_dir():
        os.replace(new, old)
        return
    for name in sorted(_files(new)):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, old / name)


def _sync(stage: Path) -> None:
    """Let the files be on disk before their names are."""
    for name in _files(stage):
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
