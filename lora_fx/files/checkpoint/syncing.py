"""Brings written bytes to the disk while others are computed: syncing at the end would wait for all of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from lora_fx.files.checkpoint.rawbytes import RawBytes

_EVERY = 1 << 26


class Syncing:
    """A thread that syncs files, one after the other; its errors are raised in the thread that writes."""

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
        if self._unsynced >= _EVERY and (self._last is None or self._last.done()):
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
