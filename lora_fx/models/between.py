"""A change of a model that other threads run: between their calls of it, so that each call sees one state.

Nothing waits where nothing is changed: a model that is only called has no lock and no hook.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from lora_fx.models.frames import around_call, calls_in_threads, is_in_a_call, is_one_thread, outermost_call
from lora_fx.models.walking import modules_of

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SECONDS = 0.0005
"""How long a thread that changes a model sleeps before it looks again."""


@contextlib.contextmanager
def between_calls(model: nn.Module, roots: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Return a context in which no other thread is in a call of the model: those that run end first, new ones wait.

    A call is `model(…)`, and of `generate` one for each token; a forward that torch.compile has made is not seen.  In a
    call of the model itself, as in a hook of it, nothing is waited for but others that change it from such a place.

    Args:
        model: the model.
        roots: modules in it that others call by themselves; their calls wait too.  Of other parts that are called by
            themselves those calls wait that follow one which was waited for.
    """
    with contextlib.nullcontext() if is_one_thread() else _between(model, roots):
        yield


@contextlib.contextmanager
def _between(model: nn.Module, roots: Iterable[nn.Module]) -> Iterator[None]:
    change = _Change(model)
    with change.alone() as is_behind_doors:
        is_waited_for = change.is_inside or is_behind_doors
        with contextlib.nullcontext() if is_waited_for else change.behind_doors((model, *roots)):
            yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Return a context in which no other thread changes the model as `between_calls` does; for who reads all of it."""
    with contextlib.nullcontext() if is_one_thread() else _Change(model).alone():
        yield


def one_at_a_time(function: _Function) -> _Function:
    """Return a function of a model that runs as a whole before or after others that change it: what it checks holds."""

    @functools.wraps(function)
    def alone(tuned: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with unchanged(tuned) if isinstance(tuned, nn.Module) else contextlib.nullcontext():
            return function(tuned, *args, **kwargs)

    return alone  # type: ignore[return-value]


class _Change:
    """What a thread is changing, or waits to change."""

    def __init__(self, model: nn.Module) -> None:
        self.thread = threading.get_ident()
        self.modules = frozenset(map(id, modules_of(model)))
        self.is_inside = outermost_call(sys._getframe(), self.modules) is not None
        """Whether a call of the model is running in this thread: then whoever waits for calls waits for this."""
        self.open = threading.Event()
        """Set when calls in other threads need not wait."""
        self.has_doors = False
        self._waiting: set[int] = set()

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Let no other thread change any of it meanwhile; give whether this one lets calls of it wait already."""
        try:
            with _LOCK:
                mine = [one for one in _CHANGES if one.thread == self.thread]
                own = [one for one in mine if self._touches(one)]
                if not own:
                    self._wait_in_turn(is_free=not mine and not is_in_a_call(sys._getframe()))
                _CHANGES.append(self)
            yield any(one.has_doors for one in own)
        finally:
            with _LOCK:
                if self in _CHANGES:
                    _CHANGES.remove(self)
                    _LOCK.notify_all()

    def _wait_in_turn(self, is_free: bool) -> None:
        """Wait until no other thread changes any of it, with the lock held.

        Who is free, in no call and no change for which others wait, lets those go first that came first: a thread that
        makes one change after the other would keep them waiting for ever.
        """
        _QUEUE.append(self)
        try:
            _LOCK.wait_for(
                lambda: (
                    not any(map(self._waits_for, _CHANGES))
                    and not (is_free and any(map(self._touches, _QUEUE[: _QUEUE.index(self)])))
                )
            )
        finally:
            _QUEUE.remove(self)
            _LOCK.notify_all()

    def _touches(self, other: "_Change") -> bool:
        return not self.modules.isdisjoint(other.modules)

    def _waits_for(self, other: "_Change") -> bool:
        """Whether another thread's change must end before this one: not one that waits for the call this is in."""
        return other.thread != self.thread and self._touches(other) and (other.is_inside or not self.is_inside)

    @contextlib.contextmanager
    def behind_doors(self, roots: Iterable[nn.Module]) -> Iterator[None]:
        """Wait until no other thread is in a call, and let new ones wait until the context ends."""
        handles, self.has_doors = {}, True
        try:
            called = list(roots)
            while called:
                for module in called:  # whoever calls a part again and again would never be seen outside of it
                    if id(module) not in handles:
                        handles[id(module)] = module.register_forward_pre_hook(_Door(self), prepend=True)
                called = self._called()
                if called:
                    time.sleep(_SECONDS)
            yield
        finally:
            self.open.set()
            for handle in handles.values():
                handle.remove()

    def _called(self) -> list[nn.Module]:
        """Return what threads are in calls of, but for the owner and those that wait; of each the first module."""
        return calls_in_threads(self.modules, but=(self.thread, *self._waiting))

    def wait(self, module: nn.Module) -> None:
        """Let a call that has just begun wait in another thread, where it is not a part of one that runs."""
        thread = threading.get_ident()
        if thread == self.thread or self.open.is_set():
            return
        if id(module) not in self.modules and not getattr(module, "_is_replica", False):
            return  # a stand-in, called for a call that is waited for
        if outermost_call(around_call(sys._getframe(), module), self.modules) is None:
            self._waiting.add(thread)
            self.open.wait()


class _Door:
    """A hook at which calls of other threads wait."""

    def __init__(self, change: _Change) -> None:
        self._change = change

    def __call__(self, module: nn.Module, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._change.wait(module)

    def __reduce__(self) -> tuple[object, ...]:
        return _Opened, ()  # nobody changes a copy


class _Opened:
    """What a door is in a copy of a model."""

    def __call__(self, *_: object) -> None:
        """Do nothing."""


_LOCK = threading.Condition()
_CHANGES: list[_Change] = []
"""What threads are changing."""
_QUEUE: list[_Change] = []
"""What threads wait to change, first come first."""


def _only_this_thread() -> None:
    """Forget, in a process that has been forked, what threads were doing that are not in it."""
    global _LOCK
    _LOCK = threading.Condition()
    _QUEUE.clear()
    for change in list(_CHANGES):
        if change.thread != threading.get_ident():
            change.open = threading.Event()  # the other one's lock may be held by nobody now
            change.open.set()
            _CHANGES.remove(change)


if (at_fork := getattr(os, "register_at_fork", None)) is not None:  # Windows forks nothing
    at_fork(after_in_child=_only_this_thread)
