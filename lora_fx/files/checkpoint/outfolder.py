"""A directory that is filled file by file: a file is whole or hidden, and a journal says that more must come.

With the journal a merge that was killed can be finished, and finished by nothing else.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_fx.errors import MergeError
from lora_fx.files.atomic import locked, settle, sync_file, write_synced
from lora_fx.files.checkpoint.basefiles import CONFIG, BaseCheckpoint, read_object
from lora_fx.files.checkpoint.report import MergedTensor
from lora_fx.text import listing

OURS = ".lora-fx-merge"
"""Beginning of every hidden file that a merge keeps in its directory while it runs."""
JOURNAL = f"{OURS}.json"
_LOCK = f"{OURS}.lock"
FORMAT = 1
"""Grows whenever the same inputs would give other bytes."""


def part_of(path: Path) -> Path:
    """Return where a file is written before it is whole."""
    return path.with_name(f"{OURS}.{path.name}.part")


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file: the old one or the new one is there, whole."""
    write_synced(fresh_part_of(path), content)
    settle(part_of(path), path)


def fresh_part_of(path: Path) -> Path:
    """Return where a file is written before it is whole; what was there is gone, and no link of that name followed."""
    part_of(path).unlink(missing_ok=True)
    return part_of(path)


def carry(source: Path, target: Path) -> None:
    """Copy a file byte by byte; what a link points to is copied, not the link."""
    with source.open("rb") as read, fresh_part_of(target).open("xb") as written:
        shutil.copyfileobj(read, written)
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
    left = sum(map(_size, folder.glob(f"{OURS}.*.part"))) if folder.is_dir() else 0
    return shutil.disk_usage(parent).free + left


def _size(path: Path) -> int:
    """Return the size of a file; 0 where another merge has given it its name meanwhile."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def is_read_only(folder: Path) -> bool:
    """Whether nothing can be written there, whatever is free."""
    flags = getattr(os, "ST_RDONLY", None)  # Windows has no such mounts
    return flags is not None and bool(os.statvfs(_nearest(folder)).f_flag & flags)


def _nearest(folder: Path) -> Path:
    """Return the directory itself, or the nearest above it that is there."""
    return next(directory for directory in (folder, *folder.absolute().parents) if directory.is_dir())


@contextlib.contextmanager
def entered(folder: Path) -> Iterator[None]:
    """Make the directory and keep other merges out of it; where nothing was written, nothing stays.

    Raises:
        MergeError: another process merges into it, or something else lies there by now.
    """
    made = [directory for directory in (folder, *folder.absolute().parents) if not directory.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / _LOCK, wait=False):
            check_folder(folder)
            yield
    except BlockingIOError as error:
        raise MergeError(f"{folder}: another process is merging into it") from error
    finally:
        with contextlib.suppress(OSError):
            for directory in made:
                directory.rmdir()


# -- the journal


def inputs_of(base: BaseCheckpoint, adapters: Sequence[tuple[Path, Path]], options: dict[str, Any]) -> dict[str, Any]:
    """Return what the result depends on: files of the base by size and time, headers and adapters by their hash."""
    names = [*base.shards, *filter(None, (base.index, CONFIG if base.config is not None else None))]
    return {
        "format": FORMAT,
        "base": {name: size_and_time(base.folder / name) for name in names},
        "headers": {name: file.sha256 for name, file in base.shards.items()},
        "adapters": [[_sha256(file) for file in files] for files in adapters],
        **options,
    }


def size_and_time(path: Path) -> list[int]:
    """Return a file's size, and when it was last written."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True)
class MergeJournal:
    """Which files of an unfinished merge are whole, with the report on their tensors."""

    folder: Path
    inputs: dict[str, Any]
    done: dict[str, tuple[int, tuple[MergedTensor, ...]]] = field(default_factory=dict)

    def note(self, shard: str, size: int, tensors: Sequence[MergedTensor]) -> None:
        """Write down that a file is whole."""
        self.done[shard] = (size, tuple(tensors))
        self.write()

    def write(self) -> None:
        """Write the journal into its directory, whole."""
        shards = {
            name: {"size": size, "tensors": [tensor.to_dict() for tensor in t]} for name, (size, t) in self.done.items()
        }
        write_whole(self.folder / JOURNAL, json.dumps({"inputs": self.inputs, "shards": shards}, indent=1).encode())

    def is_done(self, shard: str) -> bool:
        """Whether the file is written, and still has its size."""
        path = self.folder / shard
        return shard in self.done and path.is_file() and path.lstat().st_size == self.done[shard][0]

    def tensors(self) -> Iterator[MergedTensor]:
        """Yield the report's rows, by file name."""
        for name in sorted(self.done):
            yield from self.done[name][1]

    def close(self) -> None:
        """Delete the journal: the merge is finished."""
        (self.folder / JOURNAL).unlink()


def open_journal(folder: Path, inputs: dict[str, Any]) -> MergeJournal:
    """Return the journal of the directory: a new one, or that of the same merge, to be continued; nothing is written.

    Raises:
        MergeError: an unfinished merge of other inputs lies there, or a damaged journal.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return MergeJournal(folder, inputs)
    noted = read_object(path)
    try:
        shards = {
            name: (int(entry["size"]), tuple(MergedTensor.from_dict(t) for t in entry["tensors"]))
            for name, entry in noted["shards"].items()
        }
        different = [key for key in {**noted["inputs"], **inputs} if noted["inputs"].get(key) != inputs.get(key)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MergeError(f"{path}: is damaged: {error!r}", advice="delete the directory and merge again") from error
    if different:
        facts = [(key, "is another than when it began") for key in different]
        advice = "give the same inputs to finish it, or delete the directory"
        raise MergeError(f"{folder}: holds an unfinished merge of something else", facts, advice)
    return MergeJournal(folder, inputs, shards)
