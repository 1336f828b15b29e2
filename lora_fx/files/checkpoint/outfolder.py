"""A directory that is filled file by file: a file is whole or hidden, and a journal says that more must come."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_fx.errors import MergeError
from lora_fx.files.atomic import settle, sync_file, write_synced
from lora_fx.text import listing

OURS = ".lora-fx-merge"
"""Beginning of every hidden file that a merge keeps in its directory while it runs."""
JOURNAL = f"{OURS}.json"
_LOCK = f"{OURS}.lock"


def part_of(path: Path) -> Path:
    """Return where a file is written before it is whole."""
    return path.with_name(f"{OURS}.{path.name}.part")


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file: the old one or the new one is there, whole."""
    write_synced(part_of(path), content)
    settle(part_of(path), path)


def carry(source: Path, target: Path) -> None:
    """Copy a file byte by byte; what a link points to is copied, not the link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, part_of(target))
    sync_file(part_of(target))
    settle(part_of(target), target)


def check_folder(folder: Path) -> None:
    """Refuse a directory that holds anything but an unfinished merge.

    Raises:
        MergeError: it is a file, or not empty and not ours.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise MergeError(f"{folder}: is there already, and no directory; nothing was written")
    names = sorted(path.name for path in folder.iterdir())
    if JOURNAL not in names and not all(name.startswith(OURS) for name in names):
        facts = [("holds", listing(names))]
        raise MergeError(
            f"{folder}: is there already; nothing was written", facts, "name a directory that is not there"
        )


def free_bytes(folder: Path) -> int:
    """Return how much may be written there: what is free, and what an interrupted run has left and will overwrite."""
    parent = _nearest(folder)
    left = sum(path.stat().st_size for path in folder.glob(f"{OURS}.*.part")) if folder.is_dir() else 0
    return shutil.disk_usage(parent).free + left


def is_read_only(folder: Path) -> bool:
    """Whether nothing can be written there, whatever is free."""
    flags = getattr(os, "ST_RDONLY", None)  # Windows has no such mounts
    return flags is not None and bool(os.statvfs(_nearest(folder)).f_flag & flags)


def _nearest(folder: Path) -> Path:
    """Return the directory itself, or the nearest above it that is there."""
    return next(directory for directory in (folder, *folder.absolute().parents) if directory.is_dir())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other merges out of the directory; the lock of a process that was killed is gone with it.

    Raises:
        MergeError: another process merges into it.
    """
    path = folder / _LOCK
    with path.open("wb") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MergeError(f"{folder}: another process is merging into it") from error
            yield
    path.unlink(missing_ok=True)
