"""A private copy of a submodule that reports what its forward does.

The copy has the same parameters (the same objects) but its own modules and attributes, so a capture leaves no trace in
the user's model, needs no global patch of `nn.Module`, and disturbs no other thread.  Each module of the copy, and each
plain object that it holds, gets a dynamic subclass of its class that reports calls, reads and writes to a listener.
"""

import sys
from collections import OrderedDict
from types import MethodType
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.attach import shown_parameters
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.adapters.trained import chosen_names
from lora_fx.capture.calls.arguments import is_constant
from lora_fx.capture.calls.objects import StandIn, is_plain_object, subclass_of
from lora_fx.capture.calls.reasons import Untraceable
from lora_fx.capture.reads.dependencies import Dependencies
from lora_fx.capture.reads.frozen import Freezer, OfType, Unfreezable
from lora_fx.capture.reads.libraries import is_library_file, is_library_module
from lora_fx.capture.reads.opennumbers import OpenNumbers
from lora_fx.capture.reads.places import AttributePath
from lora_fx.models.copying import THEMSELVES, copied_tree
from lora_fx.models.fsdp import is_mark, plain_shell
from lora_fx.models.swap import is_swapped, origin, swap, unswap
from lora_fx.models.walking import buffers_in, modules_of, named_modules_of, parameters_in

_LISTENER = "_lora_fx_listener"
_PATH = "_lora_fx_access"
_HOLD_NONE = THEMSELVES | {dict, OrderedDict, set}
"""Types of attributes that are no tensor, module or sequence of them."""
_INTERNAL = frozenset({*vars(nn.Module()), *vars(nn.Module), _LISTENER, _PATH}) - {"training"}


class Listener:
    """Base of the tracers: hears what the copy of a module does, and writes down what is read of it.

    A subclass says what a call gives and what becomes of a write.
    """

    listening: bool
    dependencies: Dependencies
    original: nn.Module
    owned: dict[int, str]
    """Path of each parameter and buffer of the copy by its identity."""
    open: OpenNumbers | None = None
    """Integers that are left open."""

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module of the copy was called; return what the call returns."""
        raise NotImplementedError

    def wrote(self, place: AttributePath) -> None:
        """The forward wrote an attribute."""
        raise NotImplementedError

    def refuse(self, reason: str) -> None:
        """The forward does what cannot be followed."""
        raise Untraceable(reason)

    def read(self, place: AttributePath, value: Any) -> Any:
        """The constant `value` was read at `place`; return what the forward sees."""
        left_open = self.open.of(place, value) if self.open is not None else None
        if left_open is not None:
            return left_open
        self.dependencies.read.setdefault(place, list(value) if isinstance(value, list) else value)
        return value

    def held(self, place: AttributePath, value: Any) -> None:
        """Something that is neither constant nor method was read at `place`."""
        if place in self.dependencies.held:
            return
        original = self._original(place)
        if reports(value):
            self.dependencies.held[place] = OfType(type(original))
            return
        paths = {id(module): path for path, module in named_modules_of(self.original)}
        try:
            self.dependencies.held[place] = Freezer(paths).freeze(value if isinstance(value, Tensor) else original)
        except Unfreezable as error:
            self.refuse(f"the forward reads {place}, {error}")

    def method(self, place: AttributePath) -> None:
        """A method of its class was read at `place`."""
        self.dependencies.methods[place] = None

    def child(self, place: AttributePath, value: Any) -> None:
        """A submodule, parameter or buffer was read at `place`."""
        known = path_of(value) if isinstance(value, nn.Module) else self.owned.get(id(value), str(place))
        if known != str(place):
            self.dependencies.aliases[place] = known

    def children(self, path: str, children: dict[str, Any]) -> None:
        """The children of the module at `path` were listed."""
        self.dependencies.children.setdefault(path, tuple(children))
        for name, child in children.items():
            if child is not None:
                self.child(AttributePath(path, (name,)), child)

    def absent(self, place: AttributePath) -> None:
        """Somebody asked for `place`, and there is nothing."""
        self.dependencies.absent[place] = None

    def _original(self, place: AttributePath) -> Any:
        value: Any = self.original.get_submodule(place.path)
        for name in place.attributes:
            value = vars(value)[name] if name in vars(value) else getattr(value, name)
        return value


class _Reporting:
    """What modules and plain objects have in common: reads and writes are reported."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        own = super().__getattribute__("__dict__")
        listener = _listening(own)
        if listener is None:
            return value
        if name in _INTERNAL or name.startswith("__"):
            _heard_inside(listener, own, name, value)
        elif name in own or not isinstance(vars_of_class(type(self), name), property):  # a property's own code is heard
            return _heard(listener, self, own, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        listener = _listening(own)
        if listener is not None and not _is_there(own, name, value):
            listener.wrote(_place(own, name))
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        own = self.__dict__
        listener = _listening(own)
        if listener is not None:
            listener.wrote(_place(own, name))
        super().__delattr__(name)


def _listening(own: dict[str, Any]) -> Listener | None:
    """Return who listens to the module or object with these attributes, if somebody does now."""
    listener: Listener | None = own.get(_LISTENER)
    return listener if listener is not None and listener.listening else None


def _heard(listener: Listener, owner: Any, own: dict[str, Any], name: str, value: Any) -> Any:
    """Let the listener hear of a value; return what the forward sees."""
    place = _place(own, name)
    if is_constant(value):
        return listener.read(place, value)
    if isinstance(value, MethodType) and name not in own and value.__self__ in (owner, type(owner)):
        listener.method(place)
    elif isinstance(value, nn.Module) and _PATH in vars(value):
        listener.child(place, value)
    else:
        listener.held(place, value)
    return value


def _heard_inside(listener: Listener, own: dict[str, Any], name: str, value: Any) -> None:
    """Hear of what torch itself reads all the time, where it matters."""
    if name == "_modules":
        listener.children(own[_PATH].path, value)
    elif name == "__dict__":
        asks = sys._getframe(2).f_code
        if asks.co_name != "__getattr__" and not is_library_file(asks.co_filename):  # what that finds is heard anyway
            listener.refuse(f"the forward reads all attributes of {str(own[_PATH]) or 'the module'}")


def vars_of_class(kind: type, name: str) -> Any:
    """Return what the class has under the name, unbound, or None."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _is_there(own: dict[str, Any], name: str, value: Any) -> bool:
    """Whether the attribute is this very object already: `self.steps += 1` writes to a buffer in place."""
    tables = (own, own.get("_buffers", {}), own.get("_parameters", {}))
    return any(name in table and table[name] is value for table in tables)


def _place(own: dict[str, Any], name: str) -> AttributePath:
    here: AttributePath = own[_PATH]
    return AttributePath(here.path, (*here.attributes, name))


class ReportingModule(_Reporting, nn.Module):
    """Mixin for the modules of a copy."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_LISTENER].called(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        listener = _listening(own)
        try:
            value = super().__getattr__(name)
        except AttributeError:
            if listener is not None:
                listener.absent(_place(own, name))
            raise
        if listener is not None:
            if isinstance(value, (Tensor, nn.Module)):
                listener.child(_place(own, name), value)
            else:
                return _heard(listener, self, own, name, value)
        return value


class ReportingObject(_Reporting, StandIn):
    """Mixin for the plain objects that a copy holds (a config)."""

    def __getattr__(self, name: str) -> Any:
        inherited = vars_of_class(plain_class(self), "__getattr__")
        try:
            if inherited is None:
                raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
            return inherited(self, name)
        except AttributeError:
            own = self.__dict__
            listener = _listening(own)
            if listener is not None and not name.startswith("__"):
                listener.absent(_place(own, name))
            raise


def reporting_copy(module: nn.Module, listener: Listener) -> nn.Module:
    """Return a copy of the module that reports to the listener.

    It shares the parameters with the module, not the buffers: torch runs in-place operations on small integer tensors
    (BatchNorm's `num_batches_tracked`) for real, even under fake tensors.
    """
    duplicate = copied_module(module)
    for path, child in named_modules_of(duplicate):
        _as_seen(child)
        unswap(child)
        _report_objects(child, module.get_submodule(path), path, listener)
        object.__setattr__(child, _LISTENER, listener)
        object.__setattr__(child, _PATH, AttributePath(path, ()))
        swap(child, ReportingModule)
    return duplicate


def _as_seen(module: nn.Module) -> None:
    """Let the weight of a module that shows an effective weight instead look like that one: it is trained."""
    shown = shown_parameters(module)
    for name in (*shown, *chosen_names(module)):
        weight = module._parameters.get(name)
        seen: Any = None if weight is None else getattr(module, name)
        if weight is not None and (name in shown or seen.requires_grad != weight.requires_grad):
            module._parameters[name] = nn.Parameter(weight.detach(), requires_grad=seen.requires_grad)


def copied_module(module: nn.Module) -> nn.Module:
    """Return a copy that shares parameters, hooks, what adapters know of themselves, and what lies outside (a model, a
    rotary table) with the module.

    Of a module that FSDP2 shards it is a plain one: while it is called its parameters are whole.
    """
    return copied_tree(plain_shell(module) or module, {id(kept): kept for kept in _shared(module)})


def _shared(module: nn.Module) -> list[object]:
    modules = modules_of(module)
    kept: list[object] = [*parameters_in(modules)]
    own = {*map(id, modules), *map(id, buffers_in(modules))}
    for child in modules:
        for value in child.__dict__.values():
            if type(value) in _HOLD_NONE:
                continue
            if type(value) is AdapterSpec:  # which no forward changes
                kept.append(value)
                continue
            for item in value if issubclass(type(value), (list, tuple)) else (value,):
                if issubclass(type(item), (Tensor, nn.Module)) and id(item) not in own:
                    kept.append(item)
        for table in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks):
            kept += table.values()
    return kept


def _report_objects(duplicate: Any, original: Any, path: str, listener: Listener) -> None:
    """Let the plain objects that the module holds report too, and those that they hold, if the copy has its own."""
    waiting = [(duplicate, original, AttributePath(path, ()))]
    while waiting:
        owner, source, place = waiting.pop()
        for name, value in list(vars(owner).items()):
            given = vars(source).get(name)
            if name in _INTERNAL or value is given or not is_plain_object(value) or _LISTENER in vars(value):
                continue
            if is_library_module(type(value).__module__):
                continue  # its methods may be written in C, whose reads are not reported
            try:
                object.__setattr__(value, "__class__", subclass_of(type(value), ReportingObject))
            except TypeError:
                continue  # its class allows no subclass in place: it is compared as a whole
            where = AttributePath(path, (*place.attributes, name))
            vars(value).update({_LISTENER: listener, _PATH: where})
            waiting.append((value, given, where))


def reports(value: object) -> bool:
    """Whether the value is an object of a copy that reports what is read from it."""
    return isinstance(value, ReportingObject)


def class_of(module: nn.Module) -> type:
    """Return the class that a module of a copy has in the model."""
    kind = type(module)
    return origin(kind)[0] if is_swapped(kind) else kind


def plain_class(value: object) -> type:
    """Return the class that a module or object of a copy has in the model."""
    kind = type(value)
    if isinstance(value, nn.Module):
        return class_of(value)
    return kind.__bases__[1] if issubclass(kind, ReportingObject) else kind


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of a module or object, what reporting needs, torch's own tables and FSDP2's marks apart."""
    hidden = _INTERNAL if isinstance(value, nn.Module) else (_LISTENER, _PATH)
    return {name: part for name, part in vars(value).items() if name not in hidden and not is_mark(name)}


def path_of(module: nn.Module) -> str:
    """Return where in the copy the module is."""
    place: AttributePath = module.__dict__[_PATH]
    return place.path
