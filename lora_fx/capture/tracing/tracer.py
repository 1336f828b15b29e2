"""The tracer: runs a submodule's real forward on fake tensors and writes every torch function into a graph.

Python runs for real (isinstance, decorators, dataclasses, dict arguments, `*shape`), so nothing has to be rewritten.
What cannot be proven to be the same at the next call is refused with a reason; a refusal inside a child makes that
child one opaque call, and the rest goes on.
"""

import contextlib
import functools
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx, nn

from lora_fx.capture.calls.ambient import PythonRandomState, no_collections
from lora_fx.capture.calls.reasons import Untraceable, reason_of
from lora_fx.capture.reads.dependencies import Dependencies
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.reads.tensor_queries import POINTERS, TensorQuery, kind_of_query
from lora_fx.capture.tracing.changes import changed_attribute, changed_registration, tables_of
from lora_fx.capture.tracing.copies import Listener, class_of, path_of, reporting_copy
from lora_fx.capture.tracing.globals import Globals
from lora_fx.capture.tracing.patches import CustomFunction, patched
from lora_fx.capture.tracing.proxies import Proxies, is_proxy, settle
from lora_fx.capture.tracing.recording import NeedsRecord, Records, fake_result, of_shape
from lora_fx.capture.tracing.writer import TRANSFORMED, GraphWriter, holds_tensor
from lora_fx.models.layers import has_hooks, has_own_forward, is_layer
from lora_fx.models.packed import faked, is_packed_class
from lora_fx.models.torch_internals import (
    Fakes,
    FunctionMode,
    any_autocast_enabled,
    enter_autocast,
    exit_autocast,
    is_tensor_function,
    is_transform,
    pytree,
    set_grad_enabled,
)


class Specialised(BaseException):
    """The submodule at `path` turns a size that is known to vary into a constant."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Tracer(Listener, FunctionMode):
    """Sees torch functions (as a function mode) and the calls of modules (as the listener of a reporting copy)."""

    def __init__(self, module: nn.Module, fakes: Fakes, opaque: Mapping[str, str], records: Records | None) -> None:
        FunctionMode.__init__(self, None)  # type: ignore[arg-type]
        self.listening = False
        self.original = module
        self.module = reporting_copy(module, self)
        self.fakes = fakes
        self.opaque = opaque
        self.records = records
        self.called_before: Counter[str] = Counter()
        """How often each submodule with a record has been called."""
        self.writer = GraphWriter(self.module)
        self.dependencies = Dependencies(retreats=dict(opaque))
        self.owned = self.writer.owned
        self.globals = Globals(module, self.refuse, self.asked_grad_mode)
        self.proxies: Proxies
        """The objects among the arguments."""
        self.varying: list[sympy.Symbol] = []
        """Symbols of sizes that are known to vary from call to call."""
        self._refusal: str | None = None
        self._autocasts: list[fx.Node] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module's own forward returns for the fake arguments, having written it down.

        Raises:
            Untraceable: the forward does what a graph would lose; the text is the reason.
            Specialised: it turns a size that is known to vary into a constant.
            NeedsRecord: a submodule cannot run on fake tensors.
        """
        random_state, registered, profiler = PythonRandomState(), tables_of(self.module), sys.getprofile()
        try:
            with no_collections(), patched(self), self.fakes.active(), self:
                self._listen(True)
                try:
                    result = _own_forward(self.module)(*args, **kwargs)
                finally:
                    self._listen(False)
            self._raise_if_refused()
            self._refuse_changes(random_state)
            ran = ("", *self.dependencies.inlined)
            written = changed_registration(self.module, registered, ran)
            written = written or changed_attribute(self.module, self.original, ran)
            if written is not None:
                raise Untraceable(f"the forward writes {written} to the module")
        finally:
            random_state.restore()
            self.globals.changed()
            sys.setprofile(profiler)
        self.dependencies.outside = self.globals.readings
        if self._specialised():
            raise Specialised("")
        return result

    def _refuse_changes(self, random_state: PythonRandomState) -> None:
        """Refuse what has happened outside since: random numbers drawn, a global changed."""
        drawn = random_state.drawn_from()
        if drawn is not None:
            raise Untraceable(f"the forward draws from {drawn}")
        changed = self.globals.changed()
        if changed is not None:
            raise Untraceable(f"the forward changes {changed}")

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
        take_back, outer, specialised = (
            (self.writer.mark(), self.proxies.mark()),
            self.writer.place,
            self._specialised(),
        )
        random_state = PythonRandomState()
        self.writer.place = path
        try:
            result = nn.Module.__call__(module, *args, **kwargs)
            self._raise_if_refused()
            with self.paused():
                self._refuse_changes(random_state)
        except (Untraceable, Exception) as error:
            for undo in take_back:
                undo()
            random_state.restore()
            self._refusal = None
            self._listen(True)  # Python stops profiling when the profiler raises
            self.dependencies.retreats[path] = reason_of(error)
        else:
            if self._specialised() != specialised:
                raise Specialised(path)
            self.dependencies.inlined.append(path)
            return result
        finally:
            self.writer.place = outer
        return self._leaf(module, path, args, kwargs)

    def _leaf(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node_args, node_kwargs = self.writer.argument(tuple(args)), self.writer.argument(kwargs)
        if path in self.opaque:
            return self._recorded(path, self.writer.emit("call_module", path, node_args, node_kwargs), (args, kwargs))
        codes = is_packed_class(class_of(module))  # such a layer may pack its codes anew, and must not with fakes
        if codes and any_autocast_enabled():
            raise NeedsRecord(path, f"{path} computes with codes, by kernels of its own")
        with self.paused():
            try:
                result = faked(module, *args) if codes else module.forward(*args, **kwargs)
            except Exception as error:
                self._refusal = f"{path} cannot run on fake tensors: {reason_of(error)}"
                raise NeedsRecord(path, self._refusal) from error
        result = self._distinct(result)
        self.writer.made(result, self.writer.emit("call_module", path, node_args, node_kwargs))
        return result

    def _recorded(self, path: str, node: fx.Node, arguments: Any) -> Any:
        """Return the result of a submodule whose forward must not run on fakes, as a real run has shown it."""
        results = self.records.results.get(path, []) if self.records is not None else []
        number = self.called_before[path]
        self.called_before[path] += 1
        if number >= len(results) or any(map(is_proxy, pytree.tree_leaves(arguments))):
            raise Untraceable(f"{path} cannot run on fake tensors, and no real call of it is known")
        if self.writer.writes_in_place():  # should the shape be another one, it is too late for the forward
            raise Untraceable(f"{path} cannot run on fake tensors, and the forward writes in place before")
        with self.paused():
            result = fake_result(results[number], arguments)
        self.writer.made(result, node)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                sizes = self.writer.argument(tuple(leaf.shape))
                self.writer.made(leaf, self.writer.emit("call_function", of_shape, (self.writer.argument(leaf), sizes)))
        return result

    def wrote(self, place: AttributePath) -> None:
        self.dependencies.read.pop(place, None)
        self.refuse(f"the forward writes {place} to the module")

    def refuse(self, reason: str) -> None:
        """Raise Untraceable, and remember it, in case the forward swallows it."""
        self._refusal = self._refusal or reason
        super().refuse(reason)

    # -- torch functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.listening:
            return func(*args, **kwargs)
        settle(args)
        if func is set_grad_enabled:
            self.dependencies.asks_grad_mode = True
        if func in (enter_autocast, exit_autocast):
            return self._autocast(func, args)
        if func is torch.Tensor.__iter__:  # the default iterates inside, where the mode sees nothing
            with self:
                return iter(args[0].unbind(0))
        return self._function(func, args, kwargs)

    def _function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._listen(False)
        try:
            if torch.is_inference_mode_enabled():
                raise Untraceable("the forward switches to inference mode")
            if _name(func) in POINTERS:
                raise Untraceable(f"the forward asks a tensor for {_name_of_reading(func)}")
            result = func(*args, **kwargs)
            if holds_tensor(result):
                node = self._write(func, args, kwargs)
                if not (self.writer.is_known(result) and _writes_to_argument(_name(func), kwargs)):
                    result = self._distinct(result)
                    self.writer.made(result, node)
            elif func is set_grad_enabled or _name(func) == "__setitem__":
                self._write(func, args, kwargs)
            else:
                self._note_reading(func, args, result)
        except (Untraceable, Exception) as error:
            self._refusal = self._refusal or reason_of(error)
            raise
        finally:
            self._listen(True)
        return result

    def _distinct(self, result: Any) -> Any:
        """Return a call's result with other objects for tensors that the graph has already.

        What gives its argument back today (nn.Identity, `contiguous`) may make a copy at another layout, or have been
        replaced; then the argument and the result are two.
        """
        return pytree.tree_map_only(self.writer.is_known, lambda tensor: tensor.view(tensor.shape), result)

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        arguments, keywords = self.writer.argument(tuple(args)), self.writer.argument(kwargs)
        name = _name(func)
        if name == "__get__":
            return self.writer.emit("call_function", getattr, (arguments[0], func.__self__.__name__))
        if name == "__set__":
            raise Untraceable("the forward sets an attribute of a tensor")
        if name in ("__getitem__", "__setitem__"):
            return self.writer.emit("call_function", getattr(operator, name.strip("_")), arguments)
        if inspect.ismethoddescriptor(func) or is_tensor_function(func):
            return self.writer.emit("call_method", name, arguments, keywords)
        return self.writer.emit("call_function", func, arguments, keywords)

    def _note_reading(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """A call gave Python a plain value: fine where a guard covers it, else refused."""
        kind = kind_of_query(func, _name(func))
        if args and isinstance(args[0], torch.Tensor) and not self.writer.is_known(args[0]):
            raise Untraceable("the forward looks at a tensor from outside of the module")
        asked = id(args[0]) if args else 0
        own = self.writer.owned.get(asked)
        if kind is TensorQuery.GUARDED:
            if own is not None:
                self.dependencies.owned.add(own)
        elif kind is TensorQuery.REQUIRES_GRAD and asked in self.writer.inputs:
            self.dependencies.asks_requires_grad = True
        elif kind is TensorQuery.REQUIRES_GRAD and own is not None:
            self.dependencies.flags[own] = result
        elif kind is TensorQuery.LAYOUT:
            self.dependencies.asks_layout = True
        elif is_transform(func):
            raise Untraceable(TRANSFORMED)
        else:
            raise Untraceable(f"the forward asks a tensor for {_name_of_reading(func)}")

    def _autocast(self, func: Any, args: tuple[Any, ...]) -> None:
        if func is enter_autocast:
            self._autocasts.append(self.writer.emit("call_function", func, args))
        else:
            self.writer.emit("call_function", func, (self._autocasts.pop(),))

    def asked_grad_mode(self) -> None:
        self.dependencies.asks_grad_mode = True

    def custom_function(self, function: type[torch.autograd.Function], call: Callable[[], Any], args: Any) -> Any:
        node_args = self.writer.argument(tuple(args))
        with self.paused():
            result = call()
        self.writer.made(result, self.writer.emit("call_function", CustomFunction(function), node_args))
        return result

    # -- state

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not listen for a while."""
        before = self.listening
        self._listen(False)
        try:
            yield
        finally:
            self._listen(before)

    def _listen(self, listening: bool) -> None:
        self.listening = listening
        sys.setprofile(self.globals.profile if listening else None)

    def _raise_if_refused(self) -> None:
        if self._refusal is not None:
            raise Untraceable(self._refusal)

    def _specialised(self) -> int:
        return sum(self.fakes.is_constant(symbol) for symbol in self.varying)


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls the module as a whole: layers that compute as torch's own, and modules with hooks."""
    kind = class_of(module)
    plain = is_layer(module) and not has_own_forward(kind)
    if has_hooks(module) or plain or "forward" in vars(module) or is_packed_class(kind):
        return True
    home = kind.__module__
    return home.startswith(("torch.nn", "torch.ao")) and not isinstance(module, _OPEN)


_OPEN = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer,
    nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    nn.MultiheadAttention,
)  # fmt: skip


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of the module's own class.

    transformers wraps the forward of every subclass of a checkpointing layer, and the outermost one checkpoints: here
    that would be the reporting class, and the region's own class does it already.
    """
    kind: Any = class_of(module)
    return functools.partial(kind.forward, module)


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    if is_tensor_function(func) and vars(torch.Tensor).get(name) is not func:
        # operator wrappers arrive under the wrapped function's name: __rpow__ calls itself `pow`
        return next(key for key, value in vars(torch.Tensor).items() if value is func)
    return name


def _writes_to_argument(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function returns one of its arguments because it has written to it."""
    return "out" in kwargs or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _name_of_reading(func: Any) -> str:
    return f"{func.__self__.__name__}" if _name(func) == "__get__" else f"{_name(func)}()"
