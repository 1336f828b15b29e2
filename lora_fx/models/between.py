"""A change of a model that other threads run: between their calls of it, so that each call sees one state.

Nothing waits where nothing is changed: a model that is only called has no lock and no hook.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType

import torch
from torch import nn

from lora_fx.models.torch_internals import MODULE_CALLS
from lora_fx.models.walking import modules_of

_SECONDS = 0.0005
"""How long a thread that changes a model sleeps before it looks again."""
_CHANGING = threading.RLock()
_CHANGED: list[frozenset[int]] = []
"""The modules of the models that the thread which holds the lock is changing, by their ids."""


@contextlib.contextmanager
def between_calls(model: nn.Module, roots: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Return a context in which no other thread is in a call of the model: those that run end first, new ones wait.

    A call is `model(…)`, and of `generate` one for each token; a forward that torch.compile has made is not seen.  In a
    call of the model itself, as in a hook of it, nothing is waited for.

    Args:
        model: the model.
        roots: modules in it that others call by themselves; their calls wait too.
    """
    if len(sys._current_frames()) == 1:  # a thread can only be started by this one
        yield
        return
    modules = frozenset(map(id, modules_of(model)))
    if _is_in(sys._getframe(), modules):
        yield
        return
    with _CHANGING:
        if any(not modules.isdisjoint(one) for one in _CHANGED):
            yield
            return
        door = _Door(threading.get_ident(), modules)
        doors = {id(one): one for one in (model, *roots)}.values()
        handles = [one.register_forward_pre_hook(door, prepend=True) for one in doors]
        _CHANGED.append(modules)
        try:
            door.wait_for_calls()
            yield
        finally:
            _CHANGED.remove(modules)
            for handle in handles:
                handle.remove()
            door.open.set()


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Return a context in which no other thread changes the model as `between_calls` does; for who reads all of it."""
    if len(sys._current_frames()) == 1 or _is_in(sys._getframe(), frozenset(map(id, modules_of(model)))):
        yield
        return
    with _CHANGING:
        yield


class _Door:
    """A hook at which calls of other threads wait."""

    def __init__(self, owner: int, modules: frozenset[int]) -> None:
        self.open = threading.Event()
        self._owner, self._modules = owner, modules
        self._waiting: set[int] = set()

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        if thread == self._owner or self.open.is_set() or _is_in(sys._getframe(), self._modules - {id(module)}):
            return
        self._waiting.add(thread)
        self.open.wait()

    def __reduce__(self) -> tuple[object, ...]:
        return _opened, ()  # nobody changes a copy

    def wait_for_calls(self) -> None:
        """Return when no thread but the owner and those that wait is in a call."""
        while True:
            frames = sys._current_frames()
            others = [frame for thread, frame in frames.items() if thread not in (self._owner, *self._waiting)]
            if not any(_is_in(frame, self._modules) for frame in others):
                return
            del frames, others  # they hold what is computed there
            time.sleep(_SECONDS)


def _opened() -> _Door:
    door = _Door(0, frozenset())
    door.open.set()
    return door


def _is_in(frame: FrameType | None, modules: frozenset[int]) -> bool:
    """Whether a thread, by its innermost frame, is in a call of one of these modules."""
    while frame is not None:
        if frame.f_code in MODULE_CALLS and id(frame.f_locals.get("self")) in modules:
            return True
        frame = frame.f_back
    return False
