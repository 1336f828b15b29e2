"""Atomic writing: a file is either the old one or the new one, whole, also after a crash.

The order is always the same: write beside, sync the file, rename, sync the folder.
"""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write all files beside their places first, and move them there only when all are on disk.

    Args:
        files: contents by path, moved into place in this order; folders that are missing are made.

    Raises:
        OSError: nothing has been moved, unless a rename itself failed; no temporary file is left.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            temporary[path] = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            write_synced(temporary[path], content)
        for path in files:
            os.replace(temporary[path], path)
            del temporary[path]
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
    for folder in dict.fromkeys(path.parent for path in files):
        sync_folder(folder)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk; not atomic by itself."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Bring a file that was written before to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames last; where folders cannot be opened (Windows) there is nothing to do."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(part: Path, path: Path) -> None:
    """Give a file that is written and synced its name."""
    os.replace(part, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def staged(path: Path, check: Callable[[Path, Path], None]) -> Iterator[Path]:
    """Give a path of the same name in a fresh directory beside; at the end, move all that is in there into place.

    Args:
        path: of a file or a directory; a directory that is there already keeps its other files.
        check: is given (new, old) for each name that was written, before anything is moved, and raises to refuse.

    Raises:
        OSError: the path cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield stage / path.name
        written = sorted(stage.iterdir())
        for new in written:
            check(new, path.parent / new.name)
        for name in files_in(stage):
            sync_file(stage / name)
        for new in written:
            _move(new, path.parent / new.name)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def files_in(folder: Path) -> set[Path]:
    """Return the files below a folder, relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}


def _move(new: Path, old: Path) -> None:
    if new.is_file() or not old.is_dir():
        os.replace(new, old)
        return
    for name in sorted(files_in(new)):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, old / name)
