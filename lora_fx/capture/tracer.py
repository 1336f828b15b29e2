"""The tracer: runs a submodule's real forward on fake tensors and writes every torch function into a graph.

Python runs for real (isinstance, decorators, dataclasses, dict arguments, `*shape`), so nothing has to be rewritten.
What cannot be proven to be the same at the next call is refused with a reason; a refusal inside a child makes that
child one opaque call, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn

from lora_fx.capture.copies import Place, class_of, path_of, reporting_copy
from lora_fx.capture.ghosts import Ghosts, settle
from lora_fx.capture.readings import POINTERS, Readings, what_was_read
from lora_fx.capture.reasons import Untraceable, reason_of
from lora_fx.capture.torch_internals import Fakes, FunctionMode, enter_autocast, exit_autocast, set_grad_enabled
from lora_fx.capture.writer import GraphWriter, holds_tensor


class Specialised(BaseException):
    """The submodule at `path` turns a size that is known to vary into a constant."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True, slots=True)
class CustomFunction:
    """A torch.autograd.Function as one node of a graph: its own backward stays."""

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class Log:
    """What the forward relied on, apart from its arguments."""

    read: dict[Place, Any] = field(default_factory=dict)
    absent: dict[Place, None] = field(default_factory=dict)
    inlined: list[str] = field(default_factory=list)
    retreats: dict[str, str] = field(default_factory=dict)
    """Submodules that stay one opaque call, and why."""
    owned: set[str] = field(default_factory=set)
    """Parameters, buffers and tensor attributes that were asked for their dtype, device or shape."""
    asks_requires_grad: bool = False
    asks_layout: bool = False
    asks_grad_mode: bool = False
    """Whether the forward asks for grad mode or changes it; a graph of another serves both modes."""


class Tracer(FunctionMode):
    """Sees torch functions (as a function mode) and the calls of modules (as the listener of a reporting copy)."""

    def __init__(self, module: nn.Module, fakes: Fakes, opaque: frozenset[str] = frozenset()) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.listening = False
        self.module = reporting_copy(module, self)
        self.fakes = fakes
        self.opaque = opaque
        self.writer = GraphWriter(self.module)
        self.log = Log()
        self.ghosts: Ghosts | None = None
        """The objects among the arguments, if there are any."""
        self.varying: list[sympy.Symbol] = []
        """Symbols of sizes that are known to vary from call to call."""
        self._refusal: str | None = None
        self._autocasts: list[fx.Node] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module's own forward returns for the fake arguments, having written it down."""
        luck = random.getstate()
        _refuse_fused(self.module, self.log)
        with _custom_functions_of(self), _questions_of(self), self.fakes.active(), self:
            self.listening = True
            try:
                result = self.module.forward(*args, **kwargs)
            finally:
                self.listening = False
        self._raise_if_refused()
        _refuse_random(luck)
        if self._specialised():
            raise Specialised("")
        return result

    # -- what the module does

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A submodule is called: go inside it if possible, else write the call as one node."""
        if not self.listening:
            return nn.Module.__call__(module, *args, **kwargs)
        path = path_of(module)
        if path in self.opaque or is_leaf(module):
            return self._leaf(module, path, args, kwargs)
        return self._inline(module, path, args, kwargs)

    def _inline(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        take_back, outer, specialised = self._mark(), self.writer.place, self._specialised()
        luck = random.getstate()
        self.writer.place = path
        try:
            _refuse_fused(module, self.log)
            result = nn.Module.__call__(module, *args, **kwargs)
            self._raise_if_refused()
            _refuse_random(luck)
        except (Untraceable, Exception) as error:
            take_back()
            random.setstate(luck)
            self._refusal = None
            self.log.retreats[path] = reason_of(error)
        else:
            if self._specialised() != specialised:
                raise Specialised(path)
            self.log.inlined.append(path)
            return result
        finally:
            self.writer.place = outer
        return self._leaf(module, path, args, kwargs)

    def _mark(self) -> Callable[[], None]:
        """Return a function that takes back what is written to the graph, and to objects, from now on."""
        graph = self.writer.mark()
        objects = None if self.ghosts is None else self.ghosts.mark()

        def take_back() -> None:
            graph()
            if objects is not None:
                objects()

        return take_back

    def _leaf(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node_args, node_kwargs = self.writer.argument(tuple(args)), self.writer.argument(kwargs)
        with self._paused():
            try:
                result = module.forward(*args, **kwargs)
            except Exception as error:
                raise Untraceable(f"{path} cannot run on fake tensors: {reason_of(error)}") from error
        self.writer.made(result, self.writer.emit("call_module", path, node_args, node_kwargs))
        return result

    def read(self, place: Place, value: Any) -> None:
        self.log.read.setdefault(place, list(value) if isinstance(value, list) else value)

    def absent(self, place: Place) -> None:
        self.log.absent[place] = None

    def wrote(self, place: Place) -> None:
        self.refuse(f"the forward writes {place} to the module")

    def refuse(self, reason: str) -> None:
        """Raise Untraceable, and remember it, in case the forward swallows it."""
        self._refusal = self._refusal or reason
        raise Untraceable(reason)

    # -- torch functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.listening:
            return func(*args, **kwargs)
        settle(args)
        if func is set_grad_enabled:
            self.log.asks_grad_mode = True
        if func in (enter_autocast, exit_autocast):
            return self._autocast(func, args)
        if func is torch.Tensor.__iter__:  # the default iterates inside, where the mode sees nothing
            with self:
                return iter(args[0].unbind(0))
        return self._function(func, args, kwargs)

    def _function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.listening = False
        try:
            if _name(func) in POINTERS:
                raise Untraceable(f"the forward asks a tensor for {_name_of_reading(func)}")
            result = func(*args, **kwargs)
            if holds_tensor(result):
                self.writer.made(result, self._write(func, args, kwargs))
            elif func is set_grad_enabled or _name(func) == "__setitem__":
                self._write(func, args, kwargs)
            else:
                self._note_reading(func, args, result)
        except (Untraceable, Exception) as error:
            self._refusal = self._refusal or reason_of(error)
            raise
        finally:
            self.listening = True
        return result

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        arguments, keywords = self.writer.argument(tuple(args)), self.writer.argument(kwargs)
        name = _name(func)
        if name == "__get__":
            return self.writer.emit("call_function", getattr, (arguments[0], func.__self__.__name__))
        if name == "__set__":
            raise Untraceable("the forward sets an attribute of a tensor")
        if name in ("__getitem__", "__setitem__"):
            return self.writer.emit("call_function", getattr(operator, name.strip("_")), arguments)
        if _is_method(func):
            return self.writer.emit("call_method", name, arguments, keywords)
        return self.writer.emit("call_function", func, arguments, keywords)

    def _note_reading(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """A call gave Python a plain value: fine where a guard covers it, else refused."""
        kind = what_was_read(func, _name(func))
        if kind is Readings.GUARDED and args and id(args[0]) in self.writer.owned:
            self.log.owned.add(self.writer.owned[id(args[0])])
        if kind is Readings.REQUIRES_GRAD and id(args[0]) in self.writer.inputs:
            self.log.asks_requires_grad = True
        elif kind is Readings.LAYOUT:
            self.log.asks_layout = True
        elif kind is not Readings.GUARDED:
            raise Untraceable(f"the forward asks a tensor for {_name_of_reading(func)}")

    def _autocast(self, func: Any, args: tuple[Any, ...]) -> None:
        if func is enter_autocast:
            self._autocasts.append(self.writer.emit("call_function", func, args))
        else:
            self.writer.emit("call_function", func, (self._autocasts.pop(),))

    def custom_function(self, function: type[torch.autograd.Function], call: Callable[[], Any], args: Any) -> Any:
        node_args = self.writer.argument(tuple(args))
        with self._paused():
            result = call()
        self.writer.made(result, self.writer.emit("call_function", CustomFunction(function), node_args))
        return result

    # -- state

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self.listening = False
        try:
            yield
        finally:
            self.listening = True

    def _raise_if_refused(self) -> None:
        if self._refusal is not None:
            raise Untraceable(self._refusal)

    def _specialised(self) -> int:
        return sum(self.fakes.is_constant(symbol) for symbol in self.varying)


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls the module as a whole: torch's own layers, linears, and modules with hooks."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if isinstance(module, nn.Linear):
        return True
    home = class_of(module).__module__
    return home.startswith(("torch.nn", "torch.ao")) and not isinstance(module, _OPEN)


_OPEN = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer,
    nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip


def _refuse_fused(module: nn.Module, log: Log) -> None:
    """The trace would show torch's slow path, which rounds differently from the fused kernel that really runs."""
    fused = isinstance(module, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()
    log.asks_grad_mode = log.asks_grad_mode or fused
    if fused and not module.training and not torch.is_grad_enabled():
        raise Untraceable("torch runs nn.TransformerEncoderLayer as one fused kernel in eval mode")


def _refuse_random(before: object) -> None:
    if random.getstate() != before:
        raise Untraceable("the forward draws from Python's random")


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    if inspect.isfunction(func) and func.__module__ == "torch._tensor" and vars(torch.Tensor).get(name) is not func:
        # operator wrappers arrive under the wrapped function's name: __rpow__ calls itself `pow`
        return next(key for key, value in vars(torch.Tensor).items() if value is func)
    return name


def _is_method(func: Any) -> bool:
    return inspect.ismethoddescriptor(func) or (inspect.isfunction(func) and func.__module__ == "torch._tensor")


def _name_of_reading(func: Any) -> str:
    return f"{func.__self__.__name__}" if _name(func) == "__get__" else f"{_name(func)}()"


@contextlib.contextmanager
def _custom_functions_of(tracer: Tracer) -> Iterator[None]:
    """Let the tracer see torch.autograd.Function.apply, which no mode is told of; other threads are not affected."""
    plain = vars(torch.autograd.Function)["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            return plain.__func__(cls, *args, **kwargs)

        if threading.get_ident() != thread or not tracer.listening or kwargs:
            return call()
        return tracer.custom_function(cls, call, args)

    thread = threading.get_ident()
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def _questions_of(tracer: Tracer) -> Iterator[None]:
    """Let the tracer hear of torch.is_grad_enabled, which no mode is told of; other threads are not affected."""
    plain = torch.is_grad_enabled

    def is_grad_enabled() -> bool:
        if threading.get_ident() == thread and tracer.listening:
            tracer.log.asks_grad_mode = True
        return plain()

    thread = threading.get_ident()
    torch.is_grad_enabled = is_grad_enabled
    try:
        yield
    finally:
        torch.is_grad_enabled = plain
