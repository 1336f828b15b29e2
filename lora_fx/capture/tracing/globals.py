"""What lies outside of a module and its arguments: globals, closures, defaults, flags of torch.

While a forward runs for a capture, every Python function that is neither torch's nor the standard library's is noted
when it starts.  What its code names is frozen at that moment, before the function can change it, becomes a guard, and
is compared after the run: what a capture has changed is put back, and the forward is refused.
"""

import builtins
import datetime
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.arguments import CONSTANTS, is_constant
from lora_fx.capture.calls.objects import Undo, reachable
from lora_fx.capture.reads.codes import Named, codes_inside, compares_identity, named_by
from lora_fx.capture.reads.frozen import UNCHANGING, Freezer, Frozen, Unfreezable
from lora_fx.capture.reads.functions import CACHED, Functions, cells_of
from lora_fx.capture.reads.libraries import is_library_file, is_library_module
from lora_fx.capture.reads.opennumbers import OpenNumbers
from lora_fx.capture.reads.sources import ValueSource
from lora_fx.capture.tracing.copies import plain_class

_LOOKUPS = ("get", "getenv", "__getitem__", "__contains__", "__iter__")
_CALL = (("call", None),)
_OWN = (("attribute", "__dict__"),)
_CONTENTS = (("attribute", "cell_contents"),)
_GUARDED_IN_LIBRARIES = (*CONSTANTS, list, dict, set, types.FunctionType, type)
_IS_GRAD_ENABLED = torch.is_grad_enabled
_CLASS = frozenset({"type", "__class__"})
"""How code gets at the class of an object, whose attributes it can reach by that."""
_DATES = ("now", "today", "utcnow")
_QUESTIONS = ("is_", "are_", "get_")
_ASKED_BY_NAME = frozenset({torch.get_default_dtype, torch.get_num_threads, torch.get_num_interop_threads})

_UNHEARD = frozenset({"__getattribute__", "__getstate__"})
"""What gives attributes of a module without its own class's asking, by which reads are heard."""


class Globals:
    """Everything outside that one capture has met."""

    def __init__(self, module: nn.Module, refuse: Callable[[str], None], asked_grad_mode: Callable[[], None]) -> None:
        self.refuse = refuse
        self._asked_grad_mode = asked_grad_mode
        self.readings: dict[ValueSource, Frozen] = {}
        self._kept: dict[ValueSource, tuple[Any, Undo]] = {}
        self._known: dict[types.CodeType, str] = {}
        """Why each code that has started cannot be guarded; empty if it can."""
        self._inside: set[types.CodeType] = set()
        self._freezer = _OutsideFreezer({id(child): path for path, child in module.named_modules()})
        self._functions = Functions()
        self._caches: dict[Any, int] = {}
        self.open: OpenNumbers | None = None

    # -- while the forward runs

    def profile(self, frame: types.FrameType, event: str, argument: Any) -> None:
        """Hear of every call: to be set by `sys.setprofile`."""
        if event not in ("call", "c_call"):
            return
        try:
            self._heard(frame, event, argument)
        except Unfreezable as error:
            self.refuse(str(error))

    def _heard(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call":
            if not is_library_file(code.co_filename) and not _is_generated(frame):
                self._started(frame)
            elif frame.f_back is not None and not is_library_file(frame.f_back.f_code.co_filename):
                self._asked(frame)
        elif event == "c_call" and not is_library_file(code.co_filename):
            self._called(argument)

    def _called(self, function: Any) -> None:
        owner = function.__self__ if isinstance(function, types.BuiltinFunctionType) else None
        is_date = isinstance(owner, type) and issubclass(owner, datetime.date)
        if (owner is time and function.__name__ != "sleep") or (is_date and function.__name__ in _DATES):
            self.refuse(f"the forward reads the clock ({function.__name__})")
        if function is torch.is_inference_mode_enabled:
            self.refuse("the forward asks for inference mode")
        if function is _IS_GRAD_ENABLED:
            self._asked_grad_mode()
        if function in _ASKED_BY_NAME:
            self._note(ValueSource(function, _CALL, f"{function.__name__}()"), function())

    def _asked(self, frame: types.FrameType) -> None:
        """A library's function was called by somebody else: does it answer by global state?"""
        code = frame.f_code
        if code.co_name in _LOOKUPS and (code.co_name == "getenv" or frame.f_locals.get("self") is os.environ):
            self._looked_up(frame.f_locals.get("key"))
        if code.co_argcount or code.co_kwonlyargcount or not code.co_name.startswith(_QUESTIONS):
            return
        function = frame.f_globals.get(code.co_name)
        if isinstance(function, types.FunctionType) and function.__code__ is code and not code.co_flags & 0x0C:
            answer = function()
            if is_constant(answer):
                self._note(ValueSource(function, _CALL, f"{code.co_name}()"), answer)

    def _looked_up(self, key: object) -> None:
        if not isinstance(key, str):
            self.refuse("the forward reads the whole environment")
        self._note(ValueSource(os.environ, (("lookup", key),), f"${key}"), os.environ.get(str(key)))

    def _started(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if self.open is not None and ("type" in code.co_names or compares_identity(code)):
            self.open.met(code, frame.f_locals)
        problem = self._known.get(code)
        if problem is None or (code.co_freevars and code not in self._inside):  # another closure may run the same code
            problem = self._known[code] = self._judged(frame)
        if problem:
            self.refuse(problem)

    def _judged(self, frame: types.FrameType) -> str:
        """Note what the function that starts relies on; return why that cannot be guarded, or nothing."""
        code = frame.f_code
        if (unheard := _UNHEARD.intersection(code.co_names)) and code.co_name not in _UNHEARD:
            return f"the forward reads attributes by {min(unheard)}()"
        self._inside.update(codes_inside(code))
        try:
            for named in named_by(code):
                self._name(named, frame)
            if not _CLASS.isdisjoint(code.co_names):
                self._class_of(frame)
            if code not in self._inside:
                self._function(frame)
        except Unfreezable as error:
            return str(error)
        return ""

    # -- what code names

    def _name(self, named: Named, frame: types.FrameType) -> None:
        scope: dict[str, Any] = dict(sys.modules) if named.module else frame.f_globals
        if named.root in scope:
            root = sys.modules if named.module else scope
            self._follow(ValueSource(root, (("item", named.root),), named.root), named.attributes)
        elif not named.module and named.root not in vars(builtins):  # yet to be set
            self._note(ValueSource(scope, (("has", named.root),), named.root), False)

    def _follow(self, source: ValueSource, attributes: tuple[str, ...]) -> None:
        """Note what is at the end of a chain of attributes, as far as they are those of modules and classes."""
        value = source.value()
        for attribute in attributes:
            if not _leads_on(value):
                break
            try:
                following = getattr(value, attribute)
            except AttributeError:  # the forward will meet it too
                return
            if isinstance(following, types.MethodType) and following.__self__ is value and not isinstance(value, type):
                break
            source, value = source.then("attribute", attribute), following
        if isinstance(value, types.ModuleType):
            if not is_library_module(value.__name__):
                raise Unfreezable(f"the forward hands on the module {source.name}")
        elif len(source.steps) == 1 or _may_be_set(value):
            self._note(source, value)

    def _class_of(self, frame: types.FrameType) -> None:
        """Note the constants of the class of `self`."""
        for base in _classes_of_self(frame):
            for name, value in vars(base).items():
                if not name.startswith("__") and (is_constant(value) or isinstance(value, (list, dict, set))):
                    self._note(ValueSource(base, (*_OWN, ("item", name)), f"{base.__name__}.{name}"), value)

    # -- functions

    def _function(self, frame: types.FrameType) -> None:
        """Note the defaults and the closure of the function that starts, and where it is found."""
        for kind in _classes_of_self(frame):
            self._functions.search_class(kind)
        for function, source in self._functions.running(frame):
            if source is not None:
                self._note(source, source.value())
            for table in ("__defaults__", "__kwdefaults__"):
                source = ValueSource(function, (("attribute", table),), f"the defaults of {function.__name__}")
                if source.value():
                    self._note(source, source.value())
            for variable, cell in cells_of(function):
                self._note(ValueSource(cell, _CONTENTS, f"{function.__name__}.{variable}"), cell.cell_contents)

    # -- noting

    def _note(self, source: ValueSource, value: Any) -> None:
        if source in self.readings:
            return
        self._functions.met(value)
        try:
            self.readings[source] = self._freezer.freeze(value)
        except Unfreezable as error:
            raise Unfreezable(f"the forward reads {source.name}, {error}") from None
        inside = reachable(value, (Tensor, nn.Module, *UNCHANGING))
        self._kept[source] = (value, Undo(part for part in inside if isinstance(part, (list, dict, set))))
        if isinstance(value, CACHED):
            self._caches[value] = value.cache_info().currsize

    def changed(self) -> str | None:
        """Put back what the run has changed; return its name, or None."""
        changed = None
        for source, frozen in self.readings.items():
            if not self._is_still(source, frozen):
                value, undo = self._kept[source]
                source.put_back(value)
                undo()
                changed = changed or source.name
        for function, size in self._caches.items():
            if function.cache_info().currsize != size:
                function.cache_clear()  # there are fakes in it
                changed = changed or f"the cache of {function.__name__}"
        return changed

    def _is_still(self, source: ValueSource, frozen: Frozen) -> bool:
        try:
            return self._freezer.freeze(source.value()) == frozen
        except Unfreezable:
            return False


class _OutsideFreezer(Freezer):
    """Refuses the module that is captured: what is read from it behind the back of its copy is not heard."""

    def module(self, value: nn.Module) -> Frozen:
        if id(value) in self.paths:
            raise Unfreezable("that leads to the module itself")
        return super().module(value)


def _classes_of_self(frame: types.FrameType) -> list[type]:
    """Return the classes, those of libraries apart, of the module whose method runs."""
    owner = frame.f_locals.get("self")
    kinds = plain_class(owner).__mro__ if isinstance(owner, nn.Module) else ()
    return [kind for kind in kinds if not is_library_module(kind.__module__)]


def _leads_on(value: Any) -> bool:
    """Whether attributes of the value are followed: of modules, classes and torch's objects with flags."""
    if isinstance(value, (types.ModuleType, type)):
        return True
    return type(value).__module__.startswith("torch.backends")


def _may_be_set(value: Any) -> bool:
    """Whether the attribute of a module or class with this value is a flag, or what somebody may have patched.

    What a library keeps for itself (a registry, its random generator) is its own affair; the clock, the environment and
    random numbers are heard where they are asked.
    """
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, types.MethodType)):
        return False
    if isinstance(value, types.BuiltinFunctionType):
        return isinstance(value.__self__, (types.ModuleType, type, types.NoneType))
    if isinstance(value, types.FunctionType) and value.__module__.startswith("lora_fx."):
        return False  # what the capture itself has patched, for as long as it runs
    return not is_library_module(type(value).__module__) or isinstance(value, _GUARDED_IN_LIBRARIES)


def _is_generated(frame: types.FrameType) -> bool:
    """Whether a dataclass, a named tuple or a library has made the code from a text."""
    home = str(frame.f_globals.get("__name__", ""))
    made = frame.f_code.co_qualname.startswith("__create_fn__") or home.startswith("namedtuple_")
    return frame.f_code.co_filename == "<string>" and (made or is_library_module(home))
