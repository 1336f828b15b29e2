"""Which modules threads are in calls of, as their frames tell: a model that is only called keeps no record of it.

A frame of a thread that runs is looked at with care.  `sys._current_frames` holds a lock of the interpreter, for which
a collection of garbage inside of it may wait for ever (Python 3.11 before 3.11.12,
https://github.com/python/cpython/issues/106883).  `f_locals` is a dict that stays at the frame, up to and including
3.12: values that it lets go when it is asked for again free tensors, for which torch gives other threads their turn,
and the frame may have ended before the dict is returned.  A generator that has yielded has no frame around it.
"""

import gc
import inspect
import os
import sys
import threading
from collections.abc import Callable, Container
from types import FrameType
from typing import TypeVar

from torch import nn

from lora_fx.models.torch_internals import MODULE_CALLS

_Found = TypeVar("_Found")
_LetGo = list[object]
"""What is freed after a look, when other threads may have their turn."""
_KEPT = "<values of the last look>"
"""A key of a frame's values that no local has."""
_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_TRIES = 20
"""How many times a thread is looked at whose frames end in a generator; one of a C++ program may begin with it."""


def is_one_thread() -> bool:
    """Whether no other thread can change or call anything: one can only be started by this one."""
    return _looked(lambda let_go: len(_frames(let_go))) == 1


def calls_in_threads(modules: frozenset[int], but: Container[int]) -> list[nn.Module]:
    """Return of each thread, but for some, the first of these modules that it is in a call of, if of any."""

    def look(let_go: _LetGo) -> list[nn.Module | None]:
        frames = _frames(let_go)
        return [_called_by(thread, frames[thread], modules, let_go) for thread in frames if thread not in but]

    return [module for module in _looked(look) if module is not None]


def outermost_call(frame: FrameType | None, modules: frozenset[int]) -> nn.Module | None:
    """Return the first of these modules that this thread, by a frame of it, is in a call of, if of any."""
    return _looked(lambda let_go: _outermost(frame, modules, let_go)[0])


def is_in_a_call(frame: FrameType | None) -> bool:
    """Whether this thread, by a frame of it, is in a call of any module."""
    while frame is not None and not _is_call(frame):
        frame = frame.f_back
    return frame is not None


def around_call(frame: FrameType | None, module: nn.Module) -> FrameType | None:
    """Return the frame of this thread from which the innermost call of a module was made."""
    return _looked(lambda let_go: _around(frame, module, let_go))


def _frames(let_go: _LetGo) -> dict[int, FrameType]:
    """Return the innermost frame of each thread."""
    frames = sys._current_frames()
    let_go.append(frames)
    return frames


def _called_by(thread: int, frame: FrameType | None, modules: frozenset[int], let_go: _LetGo) -> nn.Module | None:
    """Return the first of these modules that another thread is in a call of; look again where frames are cut off."""
    for _ in range(_TRIES):
        found, is_whole = _outermost(frame, modules, let_go)
        if is_whole:
            break
        frame = _frames(let_go).get(thread)
    return found


def _outermost(frame: FrameType | None, modules: frozenset[int], let_go: _LetGo) -> tuple[nn.Module | None, bool]:
    """Return the first of these modules that is called, and whether the last frame can be where a thread begins."""
    found, last = None, None
    while frame is not None:
        if _is_call(frame) and id(module := _called(frame, let_go)) in modules:
            found = module
        last, frame = frame, frame.f_back
    return found, last is None or not last.f_code.co_flags & _SUSPENDABLE


def _around(frame: FrameType | None, module: nn.Module, let_go: _LetGo) -> FrameType | None:
    is_met = False
    while frame is not None:
        is_of_module = _is_call(frame) and _called(frame, let_go) is module
        if is_met and not is_of_module:
            return frame
        is_met = is_met or is_of_module
        frame = frame.f_back
    return None


def _is_call(frame: FrameType) -> bool:
    return frame.f_code in MODULE_CALLS


def _called(frame: FrameType, let_go: _LetGo) -> nn.Module | None:
    """Return the module of a call, and let the next one who asks the frame for its values free none of them.

    They stay in the dict: a tracer or profiler of that thread may be about to write it back to the frame.
    """
    values = frame.f_locals
    module: nn.Module | None = values.get("self")
    if type(values) is dict:
        let_go.append(values.pop(_KEPT, None))
        values[_KEPT] = dict(values)
    return module


def _looked(look: Callable[[_LetGo], _Found]) -> _Found:
    """Return what is found while no garbage is collected; one thread at a time, as they share the frames' dicts."""
    let_go: _LetGo = []
    with _LOOKING:
        was_enabled = gc.isenabled()
        try:
            gc.disable()
            return look(let_go)
        finally:
            if was_enabled:
                gc.enable()


_LOOKING = threading.RLock()

if (at_fork := getattr(os, "register_at_fork", None)) is not None:  # Windows forks nothing
    at_fork(before=_LOOKING.acquire, after_in_parent=_LOOKING.release, after_in_child=_LOOKING.release)
