"""Copies of modules, equal to `copy.deepcopy`'s and made in a fraction of its time where nothing says otherwise."""

import copyreg
from collections import OrderedDict
from typing import Any
from weakref import CallableProxyType, ProxyType, WeakKeyDictionary, WeakSet, WeakValueDictionary, proxy, ref

import torch
from torch import nn

from lora_fx.models.swap import Swapped
from lora_fx.models.torch_internals import deepcopy
from lora_fx.models.walking import modules_of

THEMSELVES = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
"""Types of what a deep copy takes as it is; sizes are numbers."""
_TABLES = (OrderedDict, dict, set)
_PROXIES = (ProxyType, CallableProxyType)
_WEAK = frozenset({ref, *_PROXIES, WeakSet, WeakKeyDictionary, WeakValueDictionary})
"""Types of what deepcopy lets refer to the original: a block of the copy would call a layer of the model through it."""
_METHODS: dict[str, tuple[Any, ...]] = {
    "__new__": (object.__new__,),
    "__getattr__": (nn.Module.__getattr__,),
    "__reduce_ex__": (object.__reduce_ex__, Swapped.__reduce_ex__),
    "__reduce__": (object.__reduce__,),
    "__deepcopy__": (None,),
}
"""By what a class may be copied if its objects are copied attribute by attribute: one or the other of two."""
_GETSTATE = nn.Module.__getstate__
_GIVEN_TO_ALL = nn.Module().__dict__.keys()
"""The attributes of every module of this version of torch; one of an older file may lack some."""
_OF_OBJECTS = {
    "__new__": object.__new__,
    "__reduce_ex__": object.__reduce_ex__,
    "__reduce__": object.__reduce__,
    "__getstate__": object.__getstate__,
    "__setstate__": None,
    "__getattr__": None,
    "__getnewargs_ex__": None,
    "__getnewargs__": None,
}
"""The methods of a class whose objects are copied as `object` has it."""


def copied_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return `copy.deepcopy(module, memo)`: but weak references are to modules of the copy; the module stays unchanged.

    Where the classes of all modules leave copying to Python, they get their attributes at once, not one by one.

    Args:
        module: with its submodules.
        memo: by its id, what stands in the copy for each object that is known already; what is copied is added.

    Raises:
        Exception: whatever the copy of an attribute raises.
    """
    modules = {id(child): child for child in modules_of(module)}
    kinds = set()
    own_way = nn.Module.__getstate__ is not _GETSTATE or not memo.keys().isdisjoint(modules)
    for child in modules.values():
        kinds.add(type(child))
        own_way = own_way or "__deepcopy__" in child.__dict__
    if own_way or not all(map(_is_plain, kinds)):
        return _copied_by_python(module, memo, modules)
    for key, child in modules.items():
        memo[key] = object.__new__(type(child))
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    left: list[tuple[dict[str, Any], str]] = []
    for key, child in modules.items():
        own = child.__dict__.copy()  # as `nn.Module.__getstate__`
        own.pop("_compiled_call_impl", None)
        attributes.append((memo[key], own))
        _fill_module(own, memo, left)
    for own, name in left:
        own[name] = copied_value(own[name], memo)
    replaced = nn.Module.__setstate__.__qualname__ != "Module.__setstate__"  # torch's compiler notes which are new
    for made, own in attributes:
        if not replaced and own.keys() >= _GIVEN_TO_ALL:  # then that is all that torch does
            object.__setattr__(made, "__dict__", own)
        else:
            nn.Module.__setstate__(made, own)  # type: ignore[no-untyped-call]
    duplicate: nn.Module = memo[id(module)]
    return duplicate


def _copied_by_python(module: nn.Module, memo: dict[int, Any], modules: dict[int, nn.Module]) -> nn.Module:
    proxies = [value for child in modules.values() for value in vars(child).values() if type(value) in _PROXIES]
    memo.update((id(value), value) for value in proxies)  # else what they stand for would be copied once more
    duplicate: nn.Module = deepcopy(module, memo)
    made = [memo[key] for key, child in modules.items() if memo.get(key, child) is not child]
    for own in [vars(one) for one in made if isinstance(one, nn.Module)]:
        own.update({name: _copied_weak(value, memo) for name, value in own.items() if type(value) in _WEAK})
    return duplicate


def passes_on_copying(module: nn.Module) -> bool:
    """Whether what copies a module is that of another, which it asks for attributes: torch's `checkpoint_wrapper`."""
    if "__deepcopy__" in vars(module) or getattr(type(module), "__deepcopy__", None) is not None:
        return False
    return getattr(module, "__deepcopy__", None) is not None


def copied_alone(module: nn.Module, memo: dict[int, Any], called: nn.Module) -> nn.Module:
    """Return a deep copy of a module as Python makes it, whatever the modules in it say of copies of themselves.

    It stands in the place of the module that is `called` by that name: hooks in it may hold that.
    """
    made: nn.Module = object.__new__(type(module))
    memo[id(module)] = memo[id(called)] = made
    memo.setdefault(id(memo), []).append(module)  # as copy.deepcopy: its id is nobody else's until all copies are made
    nn.Module.__setstate__(made, deepcopy(nn.Module.__getstate__(module), memo))  # type: ignore[no-untyped-call]
    return made


def _fill_module(own: dict[str, Any], memo: dict[int, Any], left: list[tuple[dict[str, Any], str]]) -> None:
    """Put copies in the place of a module's attributes, and note which of them may hold other modules'.

    It is in one piece because a model has thousands of modules, and is copied for each comparison.
    """
    for name, value in own.items():
        kind = type(value)
        if kind in THEMSELVES:
            continue
        key = id(value)
        if key not in memo:
            if kind in _TABLES and not value:  # of hooks, mostly: deepcopy is slow at them
                memo[key] = kind()
            elif kind is dict:
                made: dict[str, Any] = {}
                for part, held in value.items():
                    if type(part) is not str or not (held is None or id(held) in memo):
                        left.append((own, name))
                        break
                    made[part] = None if held is None else memo[id(held)]
                else:
                    own[name] = memo[key] = made
                continue
            else:
                left.append((own, name))
                continue
        own[name] = memo[key]


def _is_plain(kind: Any) -> bool:
    if kind in copyreg.dispatch_table:
        return False
    for name, known in _METHODS.items():
        method = getattr(kind, name, None)
        if method is not known[0] and method is not known[-1]:
            return False
    return bool(kind.__getstate__ is nn.Module.__getstate__ and kind.__setstate__ is nn.Module.__setstate__)


def copied_value(value: Any, memo: dict[int, Any]) -> Any:
    """Return `copy.deepcopy(value, memo)`, in fewer steps where it is made of lists, tuples, dicts and plain objects.

    Args:
        value: stays unchanged, and is held by somebody until all copies by this memo are made.
        memo: as for `copied_tree`.

    Raises:
        Exception: whatever the copy of something in it raises.
    """
    kind, key = type(value), id(value)
    if kind in THEMSELVES:
        return value
    if key in memo:
        return memo[key]
    if kind is tuple:
        return _copied_tuple(value, memo)
    if kind in _WEAK:
        return _copied_weak(value, memo)
    made: Any
    if kind is list:
        made = memo[key] = []
        for part in value:
            known = type(part) in THEMSELVES
            made.append(part if known else memo[id(part)] if id(part) in memo else copied_value(part, memo))
    elif kind is dict:
        made = memo[key] = {}
        _fill(made, value, memo)
    elif (own_way := getattr(kind, "__deepcopy__", None)) is None and _is_simple(value):
        made = memo[key] = object.__new__(kind)
        _fill(object.__getattribute__(made, "__dict__"), object.__getattribute__(value, "__dict__"), memo)
    elif own_way is not None and kind.__module__.startswith("lora_fx."):  # it warns of nothing
        made = memo[key] = own_way(value, memo)
    elif own_way is None and _is_slotted(kind):
        made = memo[key] = object.__new__(kind)
        for name in kind.__slots__:
            part = getattr(value, name)
            object.__setattr__(made, name, part if type(part) in THEMSELVES else copied_value(part, memo))
    else:
        made = deepcopy(value, memo)
    return made


def _copied_weak(value: Any, memo: dict[int, Any]) -> Any:
    """Return a weak reference, or a table of such, with copies in the place of what has been copied."""

    def of(part: Any) -> Any:
        return memo.get(id(part), part)

    kind = type(value)
    if kind is WeakSet:
        return WeakSet(map(of, value))
    if kind is WeakKeyDictionary:
        return WeakKeyDictionary({of(key): copied_value(part, memo) for key, part in value.items()})
    if kind is WeakValueDictionary:
        return WeakValueDictionary({key: of(part) for key, part in value.items()})
    try:
        held = value.__repr__.__self__ if kind in _PROXIES else value()
    except ReferenceError:
        return value
    made = of(held)
    if made is held:
        return value
    return proxy(made) if kind in _PROXIES else ref(made)


def _copied_tuple(value: tuple[Any, ...], memo: dict[int, Any]) -> Any:
    parts = []
    for part in value:
        known = type(part) in THEMSELVES
        parts.append(part if known else memo[id(part)] if id(part) in memo else copied_value(part, memo))
    if id(value) in memo:  # it is in itself
        return memo[id(value)]
    made = value
    for part, given in zip(parts, value, strict=True):
        if part is not given:
            made = tuple(parts)
            break
    memo[id(value)] = made
    return made


def _fill(made: dict[Any, Any], given: dict[Any, Any], memo: dict[int, Any]) -> None:
    """Put copies of a dict's keys and values into another dict."""
    for key, part in given.items():
        name = key if type(key) is str else copied_value(key, memo)
        known = type(part) in THEMSELVES
        made[name] = part if known else memo[id(part)] if id(part) in memo else copied_value(part, memo)


def _is_simple(value: Any) -> bool:
    """Whether an object's copy is a new one of its class with copies of its attributes, and nothing else happens."""
    kind: Any = type(value)
    for name, known in _OF_OBJECTS.items():
        if getattr(kind, name, None) is not known:
            return False
    if kind in copyreg.dispatch_table or not kind.__dictoffset__ or kind.__basicsize__ > _PLAIN_SIZE:
        return False
    for base in kind.__mro__:
        if base.__dict__.get("__slots__"):
            return False
    if kind.__getattribute__ is object.__getattribute__:
        return "__deepcopy__" not in value.__dict__ and "__setstate__" not in value.__dict__
    asked = (getattr(value, "__deepcopy__", None), getattr(value, "__setstate__", None))
    same = value.__dict__ is object.__getattribute__(value, "__dict__")
    return asked == (None, None) and same and value.__reduce_ex__ == object.__getattribute__(value, "__reduce_ex__")


def _is_slotted(kind: Any) -> bool:
    """Whether it is a data class of ours whose attributes are all in slots, and copied as any data class's are."""
    return (
        kind.__module__.startswith("lora_fx.")
        and kind.__bases__ == (object,)
        and "__dataclass_fields__" in kind.__dict__
        and len(kind.__dict__.get("__slots__", ())) == len(kind.__dataclass_fields__)
        and (kind.__getstate__ is object.__getstate__ or kind.__getstate__.__module__ == "dataclasses")
    )


class _Plain:
    """A class without slots: its objects have their attributes in a dict, and may be weakly referenced."""


_PLAIN_SIZE = _Plain.__basicsize__
