"""Copies of modules, equal to `copy.deepcopy`'s and made in a fraction of its time where nothing says otherwise."""

import copyreg
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from lora_fx.models.swap import Swapped
from lora_fx.models.torch_internals import deepcopy

_THEMSELVES = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
"""Types of what a deep copy takes as it is; sizes are numbers."""
_TABLES = (OrderedDict, dict, set)
_METHODS: dict[str, tuple[Any, ...]] = {
    "__new__": (object.__new__,),
    "__getattr__": (nn.Module.__getattr__,),
    "__reduce_ex__": (object.__reduce_ex__, Swapped.__reduce_ex__),
    "__reduce__": (object.__reduce__,),
    "__deepcopy__": (None,),
}
"""By what a class may be copied if its objects are copied attribute by attribute."""
_INHERITED = ("__getstate__", "__setstate__")
"""Which methods of `nn.Module`, as they are now, it must have besides: torch's compiler replaces one of them."""


def copied_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return `copy.deepcopy(module, memo)`: the module stays unchanged.

    Where the classes of all modules leave copying to Python, they get their attributes at once, not one by one.

    Args:
        module: with its submodules.
        memo: by its id, what stands in the copy for each object that is known already; what is copied is added.

    Raises:
        Exception: whatever the copy of an attribute raises.
    """
    modules = {id(child): child for child in module.modules()}
    if not all(map(_is_plain, modules.values())) or not memo.keys().isdisjoint(modules):
        return deepcopy(module, memo)
    memo |= {key: object.__new__(type(child)) for key, child in modules.items()}
    attributes = {key: _state_of(child) for key, child in modules.items()}
    places = [(own, name) for own in attributes.values() for name in own if not _is_copied(own, name, memo)]
    copied = deepcopy([own[name] for own, name in places], memo)
    for (own, name), value in zip(places, copied, strict=True):
        own[name] = value
    for key, own in attributes.items():
        nn.Module.__setstate__(memo[key], own)  # type: ignore[no-untyped-call]
    made: nn.Module = memo[id(module)]
    return made


def _state_of(module: nn.Module) -> dict[str, Any]:
    """Return a new dict with what a copy of the module is to have."""
    state: dict[str, Any] = nn.Module.__getstate__(module)  # type: ignore[no-untyped-call]
    return state


def _is_copied(own: dict[str, Any], name: str, memo: dict[int, Any]) -> bool:
    """Whether the attribute could be put in the place of the original in `own` without asking how it is copied."""
    value = own[name]
    if type(value) in _THEMSELVES:
        return True
    if id(value) not in memo:
        if type(value) in _TABLES and not value:  # of hooks, mostly: deepcopy is slow at them
            memo[id(value)] = type(value)()
        elif type(value) is dict and all(type(key) is str and _is_known(part, memo) for key, part in value.items()):
            memo[id(value)] = {key: part if part is None else memo[id(part)] for key, part in value.items()}
        else:
            return False
    own[name] = memo[id(value)]
    return True


def _is_known(part: object, memo: dict[int, Any]) -> bool:
    return part is None or id(part) in memo


def _is_plain(module: nn.Module) -> bool:
    kind: Any = type(module)
    if "__deepcopy__" in vars(module) or kind in copyreg.dispatch_table:
        return False
    methods = [(getattr(kind, name, None), known) for name, known in _METHODS.items()]
    methods += [(getattr(kind, name), (getattr(nn.Module, name),)) for name in _INHERITED]
    return all(any(method is one for one in known) for method, known in methods)
