"""Which function object runs: a frame knows its code only, defaults and closure are the function's."""

import functools
import gc
from collections.abc import Iterator
from types import CellType, CodeType, FrameType, FunctionType, MethodType
from typing import Any

from lora_fx.capture.reads.libraries import is_library_module
from lora_fx.capture.reads.sources import ValueSource

CACHED = type(functools.lru_cache(lambda: None))
"""What functools.lru_cache makes of a function."""
_DEEPEST = 6


class Functions:
    """The functions met so far, by their code, and where each was found."""

    def __init__(self) -> None:
        self._by_code: dict[CodeType, dict[int, tuple[FunctionType, ValueSource | None]]] = {}
        self._searched: dict[int, Any] = {}

    def met(self, value: Any, source: ValueSource | None = None) -> None:
        """Remember the functions in a value: a function, a method, a partial, or what a decorator made of one."""
        for function in _functions_in(value):
            self._by_code.setdefault(function.__code__, {}).setdefault(id(function), (function, source))

    def running(self, frame: FrameType) -> list[tuple[FunctionType, ValueSource | None]]:
        """Return the functions with the code of a frame that has just started; several where it may be any of them."""
        code = frame.f_code
        self._search(frame.f_globals)
        running = [candidate for candidate in self._by_code.get(code, {}).values() if _may_run(candidate[0], frame)]
        if not running:
            made = (function for function in gc.get_referrers(code) if isinstance(function, FunctionType))
            running = [(function, None) for function in made if function.__code__ is code and _may_run(function, frame)]
        return running

    def _search(self, scope: dict[str, Any]) -> None:
        """Meet the functions and the methods of classes that a module names."""
        if id(scope) in self._searched:
            return
        self._searched[id(scope)] = scope
        for name, value in list(scope.items()):
            if isinstance(value, type) and not is_library_module(value.__module__):
                self.search_class(value)
            else:
                self.met(value, ValueSource(scope, (("item", name),), name))

    def search_class(self, kind: type) -> None:
        """Meet the methods of a class."""
        if id(kind) in self._searched:
            return
        self._searched[id(kind)] = kind
        for name, value in list(vars(kind).items()):
            self.met(value, ValueSource(kind, (("attribute", "__dict__"), ("item", name)), f"{kind.__name__}.{name}"))


def _functions_in(value: Any, depth: int = 0) -> Iterator[FunctionType]:
    if depth > _DEEPEST:
        return
    inside: list[Any] = []
    if isinstance(value, FunctionType):
        yield value
        inside = [cell.cell_contents for _, cell in cells_of(value)]
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        inside = [value.__func__]
    elif isinstance(value, property):
        inside = [value.fget, value.fset]
    elif isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, functools.cached_property):
        inside = [value.func]
    elif isinstance(value, CACHED):
        inside = [value.__wrapped__]
    for part in inside:
        yield from _functions_in(part, depth + 1)


def cells_of(function: FunctionType) -> list[tuple[str, CellType]]:
    """Return the variables of the function's closure that have a value, the one of `super()` apart."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [(name, cell) for name, cell in cells if name != "__class__" and _is_full(cell)]


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _may_run(function: FunctionType, frame: FrameType) -> bool:
    """Whether it may be this function that has started: its globals and its closure are those of the frame."""
    if function.__globals__ is not frame.f_globals:
        return False
    values = frame.f_locals if function.__closure__ else {}
    return all(values.get(name) is cell.cell_contents for name, cell in cells_of(function))
