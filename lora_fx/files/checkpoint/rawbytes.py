"""Bytes read, written and copied at positions of open files, by several threads at once and in bounded memory."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Self

_POSITIONAL = "preadv" in vars(os)  # not on Windows
_IN_KERNEL = "copy_file_range" in vars(os)  # Linux only
_NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)
"""What file systems answer that cannot copy among themselves."""
_CHUNK = 1 << 20
_SYNCED_EVERY = 1 << 26


class RawBytes:
    """An open file that several threads read and write at positions of their own."""

    def __init__(self, path: Path, mode: str) -> None:
        self.file = FileIO(path, mode)
        self._lock = threading.Lock()

    def read_into(self, target: memoryview, position: int) -> None:
        """Fill the target from the file; a file that ends before is an error."""
        while len(target):
            number = self._read_some(target, position)
            if not number:
                raise OSError(0, "the file has become shorter")
            target, position = target[number:], position + number

    def _read_some(self, target: memoryview, position: int) -> int:
        if _POSITIONAL:
            return os.preadv(self.file.fileno(), [target], position)
        with self._lock:
            self.file.seek(position)
            return self.file.readinto(target) or 0

    def write_from(self, source: memoryview, position: int) -> None:
        """Write all of the source at a position."""
        while len(source):
            number = self._write_some(source, position)
            source, position = source[number:], position + number

    def _write_some(self, source: memoryview, position: int) -> int:
        if _POSITIONAL:
            return os.pwrite(self.file.fileno(), source, position)
        with self._lock:
            self.file.seek(position)
            return self.file.write(source) or 0

    def copy_from(self, source: "RawBytes", position: int, target: int, number: int) -> None:
        """Copy bytes from a position of another file to one of this, inside the kernel where that is possible."""
        while number and _IN_KERNEL:
            copied = _copied_in_kernel(source.file.fileno(), self.file.fileno(), number, position, target)
            if not copied:
                break
            position, target, number = position + copied, target + copied, number - copied
        chunk = memoryview(bytearray(min(number, _CHUNK)))
        while number:
            part = chunk[: min(number, _CHUNK)]
            source.read_into(part, position)
            self.write_from(part, target)
            position, target, number = position + len(part), target + len(part), number - len(part)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _copied_in_kernel(source: int, target: int, number: int, from_position: int, to_position: int) -> int:
    """Return how many bytes were copied; 0 where the file systems cannot."""
    try:
        return os.copy_file_range(source, target, number, from_position, to_position)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return 0
        raise


class Syncing:
    """A thread that syncs files, one after the other; its errors are raised in the thread that writes.

    Bytes go to the disk while others are computed: syncing at the end would wait for all of them.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._wait_for_last()
        finally:
            self._thread.shutdown()

    def note(self, file: RawBytes, size: int) -> None:
        """Note that so many bytes were written; from time to time what was written so far is brought to the disk."""
        self._unsynced += size
        if self._unsynced >= _SYNCED_EVERY and (self._last is None or self._last.done()):
            self.then(file.sync)

    def then(self, work: Callable[[], None]) -> None:
        """Let the thread do something when it has done what it was given before."""
        self._wait_for_last()
        self._unsynced = 0
        self._last = self._thread.submit(work)

    def _wait_for_last(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
