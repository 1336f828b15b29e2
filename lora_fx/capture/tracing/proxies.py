"""Proxies: what a forward sees during a capture in place of a plain object among its arguments (a KV cache).

A proxy has the object's class and attributes, but nothing that happens to it reaches the object.  A tensor attribute
becomes a fake input when it is first read, a constant becomes a guard, and what the forward writes becomes a statement
of the graph.  So the object's own methods run for real, and the graph does to the object what the forward would do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lora_fx.capture.calls.arguments import is_constant
from lora_fx.capture.calls.objects import IDENTITIES, StandIn, Undo, is_plain_object, subclass_of
from lora_fx.capture.calls.reasons import Untraceable
from lora_fx.capture.reads.opennumbers import OpenNumber
from lora_fx.models.code import attribute

_STATE = "_lora_fx_proxy"


class Host(Protocol):
    """The capture that proxies belong to."""

    def tensor_read(self, access: str, tensor: Tensor) -> Tensor:
        """Return the fake of a tensor found at `access`."""

    def number_read(self, access: str, number: int) -> Any:
        """Return the symbolic number for an integer found at `access`."""

    def constant_read(self, access: str, value: object) -> None:
        """A constant, or an object compared by identity, was found at `access`."""

    def required(self, expression: str, reason: str) -> None:
        """The capture relies on the expression being true; `reason` says what differs when it is not."""

    def wrote(self, function: Callable[..., None], proxy: Any, key: object, value: object) -> None:
        """The forward changes the object that the proxy stands for: `function(object, key, value)` does it again."""


@dataclass(slots=True)
class _State:
    """What a proxy knows of itself."""

    proxies: "Proxies"
    access: str
    raw: set[object] = field(default_factory=set)
    """Attributes, indices or keys whose value is still the object's own."""
    changed: bool = False
    """Whether the forward has set an item."""
    open: dict[int, OpenNumber] = field(default_factory=dict)
    """By which open number an index or key was given, for items that are found so."""

    def found_by(self, key: Any, touched: set[Any]) -> Any:
        """Return the index or key that was given; what an open number finds, nothing else may find, and it no more.

        Args:
            key: an open number, or a constant.
            touched: what of the list or dict is no longer as it was before the forward.
        """
        if type(key) is not OpenNumber:
            for number in self.open.values():
                number.is_not(key)
            return key
        if self.open.get(key.value) is not key:
            for other in {*touched, *self.open}:
                key.is_not(self.open.get(other, other))
            self.open[key.value] = key
        return key.value


def _text(key: Any) -> str:
    return key.text if type(key) is OpenNumber else repr(key)


def set_attribute(target: object, name: str, value: object) -> None:
    """Set an attribute: how a graph writes to a plain object."""
    setattr(target, name, value)


def set_item(target: Any, key: object, value: object) -> None:
    """Set an item: how a graph writes to a list or dict."""
    target[key] = value


def append_item(target: list[object], _index: int, value: object) -> None:
    """Append an item: how a graph lets a list grow."""
    target.append(value)


class Proxies:
    """All proxies of one capture."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._made: dict[int, tuple[Any, Any]] = {}
        """(object, proxy) by the object's identity."""

    def of(self, value: Any, access: str) -> Any:
        """Return what stands for the value found at `access`."""
        if isinstance(value, Tensor):
            return self.host.tensor_read(access, value)
        if type(value) is int and value > 1:  # 0 and 1 mean something to most code: they are guarded as they are
            return self.host.number_read(access, value)
        if is_constant(value) or isinstance(value, IDENTITIES):
            self.host.constant_read(access, value)
            return value
        if type(value) is tuple:
            self.host.required(f"type({access}) is tuple and len({access}) == {len(value)}", f"length: {access}")
            return tuple(self.of(item, f"{access}[{index}]") for index, item in enumerate(value))
        return self._proxy(value, access)

    def _proxy(self, value: Any, access: str) -> Any:
        if id(value) in self._made:
            proxy = self._made[id(value)][1]
            self.host.required(f"{access} is {access_of(proxy)}", f"{access} is another object")
            return proxy
        proxy = self._new(value, access)
        self._made[id(value)] = (value, proxy)
        return proxy

    def _new(self, value: Any, access: str) -> Any:
        if type(value) is list:
            proxy: Any = ProxyList(value)
            raw: set[object] = set(range(len(value)))
            self.host.required(f"type({access}) is list and len({access}) == {len(value)}", f"length: {access}")
        elif type(value) is dict:
            proxy, raw = ProxyDict(value), set(value)
            self.host.required(f"type({access}) is dict", f"{access} is not a dict")
        elif is_plain_object(value):
            try:
                proxy = object.__new__(subclass_of(type(value), ProxyObject))
            except TypeError as error:
                raise Untraceable(f"{access} is of type {type(value).__name__}") from error
            raw = set(vars(value))
            proxy.__dict__.update(vars(value))
            self.host.constant_read(f"type({access})", type(value))
        else:
            raise Untraceable(f"{access} is of type {type(value).__name__}")
        proxy.__dict__[_STATE] = _State(self, access, raw)
        return proxy

    def mark(self) -> Callable[[], None]:
        """Return a function that takes back everything written to proxies since."""
        containers = [
            part
            for _, proxy in self._made.values()
            for part in (vars(proxy) if isinstance(proxy, ProxyObject) else proxy, _state(proxy).raw)
        ]
        return Undo(containers)


def _state(proxy: Any) -> _State:
    state: _State = object.__getattribute__(proxy, "__dict__")[_STATE]
    return state


def is_proxy(value: object) -> bool:
    """Whether the value stands for an object among the arguments."""
    return isinstance(value, (ProxyObject, ProxyList, ProxyDict))


def access_of(proxy: Any) -> str:
    """Return where among the arguments the object is that a proxy stands for."""
    return _state(proxy).access


def settle(value: Any) -> None:
    """Resolve everything in a list or dict proxy: C code would see its raw contents."""
    if isinstance(value, ProxyList):
        list(iter(value))
    elif isinstance(value, ProxyDict):
        value.values()
    elif isinstance(value, (tuple, list)):
        for item in value:
            settle(item)


class ProxyObject(StandIn):
    """Mixin of the class of an object's proxy."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        own = object.__getattribute__(self, "__dict__")
        state: _State | None = own.get(_STATE)
        if state is not None and name in state.raw:
            own[name] = state.proxies.of(own[name], attribute(state.access, name))
            state.raw.discard(name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            access = access_of(self)
            _state(self).proxies.host.required(f"not hasattr({access}, {name!r})", f"{access}.{name} now exists")
        inherited = getattr(super(), "__getattr__", None)
        if inherited is None:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return inherited(name)

    def __setattr__(self, name: str, value: Any) -> None:
        state = _state(self)
        state.proxies.host.wrote(set_attribute, self, name, value)
        state.raw.discard(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"the forward deletes {access_of(self)}.{name}")


def _refused(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        raise Untraceable(f"the forward calls {name}() on {access_of(self)}")

    return refuse


class ProxyList(list[Any]):
    """The proxy of a list: items are resolved when they are read."""

    def _item(self, key: Any) -> Any:
        state = _state(self)
        index = state.found_by(key, {*range(len(self))} - state.raw)
        if index in state.raw:
            found = state.proxies.of(list.__getitem__(self, index), f"{state.access}[{_text(key)}]")
            list.__setitem__(self, index, found)
            state.raw.discard(index)
        return list.__getitem__(self, index)

    def _index(self, key: Any) -> Any:
        """Return an index from 0 on, or the open number that it is."""
        if type(key) is not OpenNumber:
            index = key.__index__()
            if not -len(self) <= index < len(self):
                raise IndexError("list index out of range")
            return index % len(self)
        if key >= len(self):
            raise IndexError("list index out of range")
        return key

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self._item(index) for index in range(*key.indices(len(self)))]
        return self._item(self._index(key))

    def __iter__(self) -> Iterator[Any]:
        return (self._item(index) for index in range(len(self)))

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, slice):
            raise Untraceable(f"the forward sets a slice of {access_of(self)}")
        state, key = _state(self), self._index(key)
        index = state.found_by(key, {*range(len(self))} - state.raw)
        state.proxies.host.wrote(set_item, self, key, value)
        state.raw.discard(index)
        list.__setitem__(self, index, value)

    def append(self, value: Any) -> None:
        _state(self).proxies.host.wrote(append_item, self, len(self), value)
        list.append(self, value)

    def _settled(self) -> list[Any]:
        return list(iter(self))

    def __contains__(self, value: object) -> bool:
        return value in self._settled()

    def __eq__(self, other: object) -> bool:
        return self._settled() == other

    def __add__(self, other: Any) -> Any:
        return self._settled() + other

    __hash__ = None
    index = count = extend = insert = pop = remove = clear = reverse = sort = copy = _refused("a list method")
    __reversed__ = __delitem__ = __iadd__ = __imul__ = __mul__ = _refused("a list method")


class ProxyDict(dict[Any, Any]):
    """The proxy of a dict: values are resolved when they are read, and whether a key is there is guarded."""

    def _known(self, key: Any) -> tuple[bool, Any]:
        """Return whether a key is there, and the key itself for an open number."""
        if type(key) is not OpenNumber and not is_constant(key):
            raise Untraceable(f"the forward looks up an object of type {type(key).__name__} in {access_of(self)}")
        state = _state(self)
        found = state.found_by(key, {*dict.keys(self)} - state.raw)
        is_there = dict.__contains__(self, found)
        if found in state.raw or not is_there:
            text = "in" if is_there else "not in"
            state.proxies.host.required(f"{_text(key)} {text} {state.access}", f"keys of {state.access}")
        return is_there, found

    def __contains__(self, key: object) -> bool:
        return self._known(key)[0]

    def __getitem__(self, key: Any) -> Any:
        is_there, found = self._known(key)
        if not is_there:
            raise KeyError(found)
        state = _state(self)
        if found in state.raw:
            access = f"{state.access}[{_text(key)}]"
            dict.__setitem__(self, found, state.proxies.of(dict.__getitem__(self, found), access))
            state.raw.discard(found)
        return dict.__getitem__(self, found)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if self._known(key)[0] else default

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not OpenNumber and not is_constant(key):
            raise Untraceable(f"the forward sets an item of {access_of(self)} under a key that is not constant")
        state = _state(self)
        found = state.found_by(key, {*dict.keys(self)} - state.raw)
        state.proxies.host.wrote(set_item, self, key, value)
        state.raw.discard(found)
        state.changed = True
        dict.__setitem__(self, found, value)

    def _all_keys(self) -> list[Any]:
        keys = list(dict.__iter__(self))
        state = _state(self)
        if state.changed:
            raise Untraceable(f"the forward lists the keys of {state.access} after changing it")
        if not all(map(is_constant, keys)):
            raise Untraceable(f"{state.access} has keys that are not constant")
        state.proxies.host.required(f"tuple({state.access}) == {tuple(keys)!r}", f"keys of {state.access}")
        return keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all_keys())

    def __len__(self) -> int:
        return len(self._all_keys()) if _STATE in self.__dict__ else dict.__len__(self)

    def keys(self) -> Any:
        return dict.fromkeys(self._all_keys()).keys()

    def values(self) -> Any:
        return {key: self[key] for key in self._all_keys()}.values()

    def items(self) -> Any:
        return {key: self[key] for key in self._all_keys()}.items()

    __hash__ = None
    setdefault = update = pop = popitem = clear = copy = _refused("a dict method")
    __delitem__ = __or__ = __ior__ = __eq__ = _refused("a dict method")
