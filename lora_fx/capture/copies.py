"""A private copy of a submodule that reports what its forward does.

The copy has the same parameters (the same objects) but its own modules and attributes, so a capture leaves no trace in
the user's model, needs no global patch of `nn.Module`, and disturbs no other thread.  Each module of the copy gets a
dynamic subclass of its class that reports calls, reads of plain attributes and writes to a listener.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lora_fx.adapters.attach import shows_effective_weight
from lora_fx.capture.arguments import is_constant
from lora_fx.capture.objects import is_plain_object
from lora_fx.swap import is_swapped, origin, swap, unswap

_LISTENER = "_lora_fx_listener"
_PATH = "_lora_fx_access"
_INTERNAL = frozenset({*vars(nn.Module()), *vars(nn.Module), _LISTENER, _PATH}) - {"training"}


@dataclass(frozen=True, slots=True)
class Place:
    """An attribute: of the module at `path`, and from there on along `attributes` (`config`, `hidden_act`)."""

    path: str
    attributes: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(filter(None, (self.path, *self.attributes)))


class Listener(Protocol):
    """Who hears what the copy does."""

    listening: bool

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module of the copy was called; return what the call returns (`plain_call` runs it)."""

    def read(self, place: Place, value: Any) -> None:
        """The constant `value` was read at `place`."""

    def absent(self, place: Place) -> None:
        """Somebody asked for `place`, and there is nothing."""

    def wrote(self, place: Place) -> None:
        """The forward wrote an attribute."""


class _Reporting:
    """What modules and configuration objects have in common: reads and writes are reported."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in _INTERNAL or name.startswith("__"):
            return value
        own = super().__getattribute__("__dict__")
        listener = own.get(_LISTENER)
        if listener is not None and listener.listening and is_constant(value):
            listener.read(_place(own, name), value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        listener = own.get(_LISTENER)
        if listener is not None and listener.listening:
            listener.wrote(_place(own, name))
        super().__setattr__(name, value)


def _place(own: dict[str, Any], name: str) -> Place:
    here: Place = own[_PATH]
    return Place(here.path, (*here.attributes, name))


class ReportingModule(_Reporting, nn.Module):
    """Mixin for the modules of a copy."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_LISTENER].called(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        listener = self.__dict__.get(_LISTENER)
        try:
            value = super().__getattr__(name)
        except AttributeError:
            if listener is not None and listener.listening:
                listener.absent(_place(self.__dict__, name))
            raise
        if value is None and listener is not None and listener.listening:
            listener.read(_place(self.__dict__, name), value)
        return value


def plain_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what calling the module itself returns, hooks included, without reporting this call."""
    return nn.Module.__call__(module, *args, **kwargs)


def reporting_copy(module: nn.Module, listener: Listener) -> nn.Module:
    """Return a copy of the module that reports to the listener.

    It shares the parameters with the module, not the buffers: torch runs in-place operations on small integer tensors
    (BatchNorm's `num_batches_tracked`) for real, even under fake tensors.
    """
    shared = {id(each): each for each in (*module.parameters(), *_outside(module))}
    duplicate = copy.deepcopy(module, dict(shared))
    for path, each in list(duplicate.named_modules()):
        _as_seen(each)
        unswap(each)
        _report_objects(each, module.get_submodule(path), path, listener)
        object.__setattr__(each, _LISTENER, listener)
        object.__setattr__(each, _PATH, Place(path, ()))
        swap(each, ReportingModule)
    return duplicate


def _as_seen(module: nn.Module) -> None:
    """Let the weight of a module that shows an effective weight instead look like that one: it is trained."""
    weight = module._parameters.get("weight")
    if weight is not None and shows_effective_weight(module):
        seen: Any = module.weight
        module._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=seen.requires_grad)


def silence(duplicate: nn.Module) -> None:
    """Give the modules of a copy their own classes back."""
    for each in duplicate.modules():
        unswap(each)


def _outside(module: nn.Module) -> Iterator[object]:
    """Yield the tensors and modules outside that the module holds as plain attributes (a model, a rotary table)."""
    inside = {id(each) for each in module.modules()}
    for each in module.modules():
        for value in vars(each).values():
            items = value if isinstance(value, (list, tuple)) else (value,)
            yield from (item for item in items if isinstance(item, (Tensor, nn.Module)) and id(item) not in inside)


def _report_objects(duplicate: nn.Module, original: nn.Module, path: str, listener: Listener) -> None:
    """Let plain objects that the module holds (a config) report too, if the copy has its own."""
    for name, value in vars(duplicate).items():
        if name in _INTERNAL or value is vars(original).get(name) or not is_plain_object(value):
            continue
        reporting = _reporting_class(type(value))
        try:
            object.__setattr__(value, _LISTENER, listener)
            object.__setattr__(value, _PATH, Place(path, (name,)))
            value.__class__ = reporting
        except (TypeError, AttributeError):  # slots or a layout of its own: what is read from it is not guarded
            continue


_REPORTING: dict[type, type] = {}


def _reporting_class(kind: type) -> type:
    if issubclass(kind, _Reporting):
        return kind
    if kind not in _REPORTING:
        _REPORTING[kind] = type(kind.__name__, (_Reporting, kind), {"__module__": kind.__module__})
    return _REPORTING[kind]


def class_of(module: nn.Module) -> type:
    """Return the class that a module of a copy has in the model."""
    kind = type(module)
    return origin(kind)[0] if is_swapped(kind) else kind


def path_of(module: nn.Module) -> str:
    """Return where in the copy the module is."""
    place: Place = module.__dict__[_PATH]
    return place.path
