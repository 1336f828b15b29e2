"""Graphs that this process has captured, for blocks of the same kind in the models that come after.

Nothing is taken as proven: a graph is a candidate, its own guard says whether it fits a call of the other model, and
before it answers anything it is compared with that model's forward, bit by bit.  What is kept holds no model or weight.
"""

import gc
import logging
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from lora_fx.capture.captured import Captured
from lora_fx.capture.tracing.inputs import VaryingSizes
from lora_fx.models.swap import original_class
from lora_fx.models.walking import modules_of
from lora_fx.regions.candidates import structure_of

MOST_KINDS = 64
"""Of how many kinds of block graphs are kept, unless `limit` says otherwise."""
_MOST_GRAPHS = 16
_MOST_CODES = 8
_MOST_OBJECTS = 50_000
_OPAQUE = (ModuleType, type, CodeType, BuiltinFunctionType, property, logging.Logger, re.Pattern)
"""What is the program's own, and no model's."""
_UNLIKE = (*_OPAQUE, FunctionType, dict)
"""What is not asked for all that it refers to."""


class Codes:
    """What was written for one graph on modules of some makes; it holds no module and no values."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def of(self, key: Hashable) -> Any:
        """Return what is kept by the key, or None."""
        return self._kept.get(key)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def keep(self, key: Hashable, made: Any) -> None:
        """Keep what was made, unless it holds on to a model or to values."""
        if not keeps_alive((key, made)):
            self._kept[key] = made
            while len(self._kept) > _MOST_CODES:
                self._kept.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Known:
    """A graph, and what it was captured for."""

    captured: Captured
    static: bool
    """Whether it is for one size only that was known to vary."""
    varying: VaryingSizes
    """The sizes that were known to vary."""
    codes: Codes = field(default_factory=Codes, compare=False)
    """Code that was written for it."""


class KnownGraphs:
    """The graphs of the kinds of block that were met last; threads may share it."""

    def __init__(self, most: int = MOST_KINDS) -> None:
        self._most = most
        self._kinds: OrderedDict[Hashable, tuple[Known, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._kinds.values()))

    def limit(self, kinds: int) -> None:
        """Keep graphs of at most so many kinds from now on; 0 keeps none."""
        with self._lock:
            self._most = kinds
            self._shrink()

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kinds.clear()

    def of(self, kind: Hashable) -> tuple[Known, ...]:
        """Return what is known of a kind of block, the oldest first."""
        with self._lock:
            if kind not in self._kinds:
                return ()
            self._kinds.move_to_end(kind)
            return self._kinds[kind]

    def codes(self, captured: Captured) -> Codes | None:
        """Return what was written for a graph; None if the graph is not kept."""
        with self._lock:
            for kind in self._kinds.values():
                for known in kind:
                    if known.captured is captured:
                        return known.codes
        return None

    def holds(self, graphs: Iterable[Captured]) -> bool:
        """Whether all these graphs are kept here: then they hold on to no model and no values."""
        with self._lock:
            kept = {id(known.captured) for kind in self._kinds.values() for known in kind}
        return kept.issuperset(map(id, graphs))

    def learn(self, kind: Hashable, known: Known, instead: Captured | None = None) -> None:
        """Keep a graph, in the place of one that it makes superfluous; not if it holds on to a model or to values."""
        if not self._most or keeps_alive((kind, known)):
            return
        with self._lock:
            others = (other for other in self._kinds.pop(kind, ()) if other.captured is not instead)
            self._kinds[kind] = (*others, known)[-_MOST_GRAPHS:]
            self._shrink()

    def forget(self, kind: Hashable, captured: Captured) -> None:
        """Keep a graph no longer: it was found to be wrong."""
        with self._lock:
            if kind in self._kinds:
                self._kinds[kind] = tuple(known for known in self._kinds[kind] if known.captured is not captured)

    def _shrink(self) -> None:
        while len(self._kinds) > self._most:
            self._kinds.popitem(last=False)


KNOWN = KnownGraphs()
"""Of this process."""


def kind_of(module: nn.Module) -> Hashable:
    """Return what is equal for blocks that may share graphs, whichever model they are of.

    `structure_of`, and the forward of each class, which somebody may have replaced: guards do not compare torch's own.
    """
    return structure_of(module), tuple(original_class(inner).forward for inner in modules_of(module))


def keeps_alive(root: object) -> bool:
    """Whether there is a way from an object to a module, or to a tensor with values, that leads through no library."""
    seen = {id(root)}
    waiting = [root]
    while waiting:
        owner = waiting.pop()
        for value in _referents(owner) if isinstance(owner, _UNLIKE) else gc.get_referents(owner):
            if id(value) in seen:
                continue
            if isinstance(value, nn.Module) or (isinstance(value, Tensor) and not value.is_meta):
                return True
            if isinstance(value, type) and "<locals>" in value.__qualname__:  # it may hold whatever was around it
                return True
            if len(seen) > _MOST_OBJECTS:
                return True
            seen.add(id(value))
            waiting.append(value)
    return False


def _referents(value: object) -> Iterator[Any]:
    if isinstance(value, _OPAQUE):
        return
    if isinstance(value, FunctionType):  # what its module holds is not its own
        yield from (value.__defaults__, value.__kwdefaults__, value.__closure__, value.__dict__)
    elif not (isinstance(value, dict) and _is_scope(value)):
        yield from gc.get_referents(value)


def _is_scope(value: dict[Any, Any]) -> bool:
    """Whether the dict is the globals of a module."""
    name = value.get("__name__")
    return isinstance(name, str) and vars(sys.modules.get(name, sys)) is value
