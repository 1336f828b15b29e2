"""What a model, its inputs and the process around it were, so that it can be told later whether they still are that.

Nothing is copied or kept alive: facts are identities of objects whose weak references must still hold, versions, shapes
and some of the values of tensors, constants, and the code of classes.  Where a change could not be seen (an array, a
quantised weight, a handle of a library) there is no such state, and whoever asks looks at the model again.
"""

import enum
import functools
import os
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.reads.frozen import UNCHANGING
from lora_fx.capture.reads.functions import cells_of
from lora_fx.capture.reads.libraries import is_library_module
from lora_fx.models.torch_internals import dispatch_depth, function_modes, global_hook_tables
from lora_fx.models.walking import devices_of
from lora_fx.regions.prefix.digests import digest_of_kernels

_MOST_PARTS = 200_000
_MOST_FACTS = 1_000_000
_VALUES = 256
"""About how many of a tensor's values are looked at: a write to `.data` leaves its version as it was."""
_CONSTANTS = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size})
_NUMBERS = (float, complex)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_ACCESSORS = (types.WrapperDescriptorType, types.MethodDescriptorType, types.MemberDescriptorType,
              types.GetSetDescriptorType, types.ClassMethodDescriptorType)  # fmt: skip
_IS_PYTHON = 1 << 9
"""The flag of classes that a class statement has made."""
_OF_NO_INTEREST = frozenset(
    {"__doc__", "__annotations__", "__weakref__", "__dict__", "_abc_impl", "__abstractmethods__"}
)


class ChangesUnseen(Exception):
    """Something can change in a way that shows nowhere; the text is its type.  An outcome, not an error."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """A model and what is around it at one time."""

    facts: list[object]
    alive: list[weakref.ref[Any]]
    """While these live, no other object has the identity of one of them."""

    def still(self, now: "ModelState") -> bool:
        """Whether a state that was taken later is the same."""
        return self.facts == now.facts and all(one() is not None for one in self.alive)


def state_of(model: nn.Module, given: Sequence[Any], made_up: Sequence[Any]) -> ModelState | None:
    """Return the state of a model, its inputs and the process; None where changes could not be told.  Nothing changes.

    Args:
        model: with all that can be reached through its modules.
        given: a user's inputs, which must stay the same objects with the same values.
        made_up: inputs that are others each time, of the same values.
    """
    if function_modes() or dispatch_depth() or torch.is_inference_mode_enabled():
        return None
    walk = _Walk()
    try:
        walk.facts += (digest_of_kernels(devices_of(model)), torch.get_default_dtype(), tuple(os.environ.items()))
        walk.through((model, *given, *global_hook_tables()))
        walk.by_value = True
        walk.through(made_up)
    except ChangesUnseen:
        return None
    return ModelState(walk.facts, walk.alive)


@dataclass(slots=True)
class _Walk:
    """A walk through all that can be reached, in an order that only depends on what is there."""

    facts: list[object] = field(default_factory=list)
    alive: list[weakref.ref[Any]] = field(default_factory=list)
    by_value: bool = False
    """Whether it does not count which object a tensor is."""
    _seen: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """With the parts themselves: the id of one that is gone may be another's."""
    _waiting: list[Any] = field(default_factory=list)
    _slots: dict[type, list[str]] = field(default_factory=dict)
    """The names of the attributes that objects of a class have in slots."""

    def through(self, roots: Sequence[Any]) -> None:
        self._waiting += reversed(roots)
        while self._waiting:
            part = self._waiting.pop()
            kind = type(part)
            if kind in _CONSTANTS:
                self.facts.append((kind.__name__, part))
            elif id(part) in self._seen:
                self.facts.append(("again", self._seen[id(part)][0]))
            elif len(self._seen) > _MOST_PARTS or len(self.facts) > _MOST_FACTS:
                raise ChangesUnseen("more than can be looked at")
            else:
                self._seen[id(part)] = (len(self._seen), part)
                self._part(part, kind)

    def _part(self, part: Any, kind: type) -> None:
        if isinstance(part, Tensor):
            self._tensor(part)
        elif isinstance(part, _CONTAINERS):
            self._container(part, kind)
        elif isinstance(part, enum.Enum):
            self._same(kind, part.name)
        elif isinstance(part, (str, bytes, int, *_NUMBERS)):
            self._same(kind, repr(part))
        elif isinstance(part, (types.FunctionType, types.MethodType, functools.partial)):
            self._function(part)
        elif isinstance(part, (property, staticmethod, classmethod)):
            parts = ("fget", "fset", "fdel") if isinstance(part, property) else ("__func__",)
            self._inside(kind.__name__, [getattr(part, name) for name in parts])
        elif isinstance(part, _ACCESSORS):
            self.facts.append((kind.__name__, part.__name__))
        elif isinstance(part, types.BuiltinFunctionType):
            self._same(part)
            self._inside("of", [] if isinstance(part.__self__, types.ModuleType) else [part.__self__])
        elif isinstance(part, UNCHANGING):
            self._same(part)
        else:
            self._object(part, kind)

    def _inside(self, what: object, parts: Sequence[Any]) -> None:
        """Note what a part is, and go through what is in it next, constants and empty containers at once."""
        self.facts.append((what, len(parts)))
        more = []
        for part in parts:
            kind = type(part)
            if kind in _CONSTANTS:
                self.facts += (kind, part)
            elif (kind in _CONTAINERS and not part) or (kind is OrderedDict and not (part or part.__dict__)):
                self.facts.append(kind)
            else:
                self.facts.append(...)
                more.append(part)
        more.reverse()
        self._waiting += more

    def _same(self, part: Any, *facts: object) -> None:
        """Note that a part must be the same object."""
        try:
            self.alive.append(weakref.ref(part))
        except TypeError:
            raise ChangesUnseen(type(part).__name__) from None
        self.facts.append((id(part), *facts))

    def _tensor(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
            raise ChangesUnseen(type(tensor).__name__)
        if tensor.is_inference() or tensor.is_quantized:
            raise ChangesUnseen("a tensor without a version")
        facts = (tensor.dtype, str(tensor.device), tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
        if self.by_value:
            self.facts.append((*facts, _some_values(tensor)))
        else:
            self._same(tensor, *facts, tensor._version, tensor.data_ptr(), _some_values(tensor))
            self._inside("attributes", [vars(tensor)] if vars(tensor) else [])

    def _container(self, part: Any, kind: type) -> None:
        if kind in _CONTAINERS:
            self.facts.append(kind.__name__)
        else:
            self._same(kind)
            self._waiting += _attributes(part)
        if isinstance(part, (set, frozenset)):
            if not all(type(item) in _CONSTANTS for item in part):
                raise ChangesUnseen("a set of objects")
            self.facts.append(frozenset(part))
        elif isinstance(part, dict):
            keys = tuple(part.keys())
            if {*map(type, keys)} <= {str}:
                self._inside(keys, list(dict.values(part)))
            else:
                self._inside("dict", [*keys, *dict.values(part)])
        else:
            self._inside("items", list(part))

    def _function(self, part: Any) -> None:
        if isinstance(part, functools.partial):
            self._inside("partial", [part.func, part.args, part.keywords])
        elif isinstance(part, types.MethodType):
            self._inside("method", [part.__func__, part.__self__])
        else:
            self._same(part)
            self._same(part.__code__)
            cells = [cell.cell_contents for _, cell in cells_of(part)]
            self._inside("function", [part.__defaults__, part.__kwdefaults__, *cells])

    def _object(self, part: Any, kind: type) -> None:
        """Note a module or an object of a Python class, with its attributes and the code of its class."""
        if kind not in self._slots:
            if not all(base is object or base.__flags__ & _IS_PYTHON for base in kind.__mro__):
                raise ChangesUnseen(kind.__name__)
            for base in kind.__mro__[:-1]:
                if id(base) not in self._seen:
                    self._class(base)
            members = [item for base in kind.__mro__ for item in vars(base).items()]
            self._slots[kind] = [name for name, value in members if type(value) is types.MemberDescriptorType]
        self._same(part)
        self._inside(id(kind), _attributes(part) + [getattr(part, name, None) for name in self._slots[kind]])

    def _class(self, kind: type) -> None:
        """Note the code of a class, and what its module has besides: a flag, a function that somebody may replace."""
        self._same(kind)
        scope = sys.modules.get(kind.__module__)
        libraries = is_library_module(kind.__module__)
        for owner in (kind, *(() if libraries or scope is None or id(scope) in self._seen else (scope,))):
            self._seen[id(owner)] = (len(self._seen), owner)
            items = {name: value for name, value in vars(owner).items() if name not in _OF_NO_INTEREST}
            self.facts.append(tuple((name, *self._shallow(value)) for name, value in items.items()))

    def _shallow(self, value: Any) -> Iterator[object]:
        """Yield what tells whether a value is the same, not what is in an object."""
        if type(value) in _CONSTANTS or type(value) in _NUMBERS:
            yield repr(value)
            return
        yield id(value)
        for inner in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            if isinstance(inner, types.FunctionType):
                self.alive.append(weakref.ref(inner))
                yield id(inner.__code__)
        if type(value) in (list, tuple, dict, set):
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            yield tuple(repr(part) if type(part) in _CONSTANTS else id(part) for part in parts)


def _attributes(part: Any) -> list[Any]:
    """Return the table of an object's attributes, if it has one."""
    return [own] if (own := getattr(part, "__dict__", None)) is not None else []


def _some_values(tensor: Tensor) -> int | None:
    """Return a hash of some of a tensor's bits, spread over all of it; None where it has none."""
    if tensor.is_meta or not tensor.numel():
        return None
    most = max(2, int(_VALUES ** (1 / max(1, tensor.dim()))))
    some = tensor.detach()[tuple(slice(None, None, max(1, size // most)) for size in tensor.shape)]
    flat = some.resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
    return hash(flat.view(torch.uint8).numpy().tobytes())
