"""Atomic writing: a file is either the old one or the new one, whole, also after a crash.

The order is always the same: write beside, sync the file, rename, sync the folder.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write all files beside their places first, and move them there only when all are on disk.

    Each is the old one or the new one; of files that belong together a kill may leave some of each (`replacing`).

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
    """Write a file that is not there and bring it to the disk; not atomic by itself.  No planted link is followed."""
    with path.open("xb") as file:
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


def place_in(folder: Path, name: str | Path) -> Path:
    """Return the place of a file in a folder, its own folder made; OSError where a link leads out of it."""
    place = folder / name
    if not place.parent.resolve().is_relative_to(folder.resolve()):
        raise NotADirectoryError(errno.ENOTDIR, "a link leads out of the directory", str(place.parent))
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def files_in(folder: Path) -> set[Path]:
    """Return the files below a folder, relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}


# -- locks


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold a lock file, which is there only as long; the lock of a process that was killed is gone with it.

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.
        OSError: it cannot be made, or something else has its name.
    """
    handle = _lock_file(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock_file(path: Path, wait: bool) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            hold(handle, wait)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.lstat(path)):
                    return handle  # and not a file that the one who held it has deleted since
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def hold(handle: int, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; False where there are no locks (Windows, some networks).

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.
    """
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
