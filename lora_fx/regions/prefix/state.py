"""What is known of the blocks whose output is kept, and of how often it was."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_fx.regions.prefix.code import BlockCode, code_of
from lora_fx.regions.prefix.digests import Owned
from lora_fx.regions.prefix.entries import KeptOutputs
from lora_fx.regions.program import Program


@dataclass(slots=True, eq=False)
class Kept:
    """What the blocks of one model have in common while their outputs are kept."""

    entries: KeptOutputs
    hits: int = 0
    """Rows that were not computed."""
    misses: int = 0
    """Rows that were computed, and kept if there was room."""
    asked: int = 0
    """How often somebody asked for what lies between two blocks, though none of it had been computed."""
    by_rows: int = 0
    by_calls: int = 0
    """Of the misses, those that were kept row by row, and those that were kept as whole calls."""
    bypassed: Counter[str] = field(default_factory=Counter)
    """Why calls of blocks went by all this."""
    _codes: dict[int, BlockCode] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def code_of(self, program: Program, block: nn.Module) -> BlockCode:
        code = self._codes.get(id(program))
        if code is None:
            code = self._codes[id(program)] = code_of(program, block)
        return code

    def count(self, hits: int = 0, misses: int = 0, by_rows: bool = False) -> None:
        with self._lock:
            self.hits += hits
            self.misses += misses
            self.by_rows += misses if by_rows else 0
            self.by_calls += 0 if by_rows else misses

    def bypass(self, reason: str) -> None:
        with self._lock:
            self.bypassed[reason] += 1

    def note_asked(self) -> None:
        with self._lock:
            self.asked += 1


@dataclass(slots=True, eq=False)
class BlockState:
    """One block of a chain.  A copy of the model, or a file of it, keeps nothing."""

    path: str
    chain: int
    """Which list of blocks it belongs to."""
    last: bool
    """Whether its output is what is kept."""
    kept: Kept | None = None
    owned: Owned = field(default_factory=Owned)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.path, self.chain, self.last

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.chain, self.last = state
        self.kept, self.owned = None, Owned()
