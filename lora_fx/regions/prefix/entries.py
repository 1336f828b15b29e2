"""Outputs of frozen blocks in memory, by digests of what they are the output of."""

import threading
from collections import OrderedDict
from typing import NamedTuple, Protocol

from torch import Tensor

_MOST_KEYS = 1 << 22
"""How many digests are remembered as asked for: of so many rows an epoch can be long."""


class Entry(NamedTuple):
    """What was kept under the digest of the first block's call."""

    end: bytes
    """The digest of all calls up to the last one."""
    value: Tensor
    """In the memory of the processor, never handed out itself."""


class Backing(Protocol):
    """Where entries are besides, and longer."""

    def get(self, key: bytes) -> Entry | None:
        """Return what was kept under a key."""

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep an entry."""


class KeptOutputs:
    """A bounded store of entries; threads may share it.

    Data that comes again comes once in an epoch.  A store that gives up what was not used for the longest time would
    have given up nearly everything by the time it comes again.  So what is kept stays, and what finds no room is not
    kept; an entry gives way once it has not been asked for in twice as many questions as there are different keys.
    """

    def __init__(self, capacity: int, backing: Backing | None = None) -> None:
        self.capacity = capacity
        self.bytes = 0
        self.left_out = 0
        """How often there was no room."""
        self._backing = backing
        self._entries: OrderedDict[bytes, tuple[Entry, int]] = OrderedDict()
        self._asked: set[bytes] = set()
        self._questions = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        """Return what was kept under a key."""
        with self._lock:
            self._note(key)
            known = self._entries.get(key)
            if known is not None:
                self._entries[key] = (known[0], self._questions)
                self._entries.move_to_end(key)
                return known[0]
        entry = None if self._backing is None else self._backing.get(key)
        if entry is not None:
            self._keep(key, entry)
        return entry

    def _note(self, key: bytes) -> None:
        self._questions += 1
        if len(self._asked) >= _MOST_KEYS:
            self._asked.clear()
        self._asked.add(key)

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep an entry, in the place of what was kept under its key."""
        self._keep(key, entry)
        if self._backing is not None:
            self._backing.put(key, entry)

    def _keep(self, key: bytes, entry: Entry) -> None:
        size = entry.value.nbytes
        with self._lock:
            before = self._entries.pop(key, None)
            self.bytes -= 0 if before is None else before[0].value.nbytes
            while self._entries and self.bytes + size > self.capacity:
                oldest, (old, used) = next(iter(self._entries.items()))
                if self._questions - used <= 2 * len(self._asked):
                    break
                del self._entries[oldest]
                self.bytes -= old.value.nbytes
            if self.bytes + size > self.capacity:
                self.left_out += 1
                return
            self._entries[key] = (entry, self._questions)
            self.bytes += size

    def clear(self) -> None:
        """Forget everything in memory."""
        with self._lock:
            self._entries.clear()
            self._asked.clear()
            self.bytes = self._questions = 0
