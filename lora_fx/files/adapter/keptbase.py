"""The base of an adapted model and its sites, kept for the next file that is checked against it."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.dicts import KEPT, AdapterDict
from lora_fx.discovery.sites import take_inventory, uses_in
from lora_fx.models.tensors import dotted
from lora_fx.models.together import PLAIN
from lora_fx.models.walking import named_modules_of
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import Inventory
from lora_fx.tuned.build import whole_record_in
from lora_fx.tuned.undo import removed

_PLAIN = (bool, int, float, str)


@dataclass(slots=True, eq=False)
class KeptBase:
    """What `base_of` has made, and of what; copies and pickles of a model begin without it."""

    plan: Plan | None = None
    parts: tuple[Any, ...] = ()
    tensors: tuple["weakref.ref[Tensor]", ...] = ()
    """Of the model: another one may lie where one of them lay, and the base has not that one."""
    base: nn.Module | None = None
    inventory: Inventory | None = None

    def is_of(self, parts: tuple[Any, ...], tensors: Sequence[Tensor]) -> bool:
        """Whether it was made of a model of these parts, with the same tensors."""
        return self.parts == parts and all(map(is_, tensors, (one() for one in self.tensors)))

    def __reduce__(self) -> Any:
        return KeptBase, ()

    def __deepcopy__(self, _memo: object) -> "KeptBase":
        return KeptBase()


def base_of(tuned: nn.Module) -> tuple[nn.Module, Inventory]:
    """Return the base of an adapted model and its sites, as `removed` and `take_inventory` do; to be read alone.

    What is there from before serves again while the model has the same modules, classes, attributes, and tensors in the
    same memory: its weights lie there, so a look at their values sees what they are now.

    Raises:
        RefusedError: as `removed`.
    """
    plan, kept = whole_record_in(tuned).plan, tuned.__dict__.get(KEPT)
    found = _parts_of(tuned)
    if kept is not None and kept.plan is plan and found is not None and kept.is_of(*found):
        return kept.base, kept.inventory
    base = removed(tuned)
    inventory = take_inventory(base, uses_in(plan))
    tuned.__dict__.pop(KEPT, None)
    if found is not None:
        _share_parameters(base, tuned)
        tuned.__dict__[KEPT] = KeptBase(plan, found[0], tuple(map(weakref.ref, found[1])), base, inventory)
    return base, inventory


def _share_parameters(base: nn.Module, tuned: nn.Module) -> None:
    """Let a base have the model's own parameters, in place: copies would keep memory that the model has left."""
    own = dict(tuned.named_parameters(remove_duplicate=False))
    for path, module in named_modules_of(base):
        for name, parameter in module._parameters.items():
            mine = own.get(dotted(path, name))
            if mine is not None and parameter is not None and mine.data_ptr() == parameter.data_ptr():
                module._parameters[name] = mine


def _parts_of(tuned: nn.Module) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """Return what a model is made of but for its adapters, and its tensors; None if that does not tell of its values.

    In one loop: `named_modules` goes through all levels for each module.
    """
    parts: list[Any] = []
    tensors: list[Tensor] = []
    waiting, met = [tuned], set[int]()
    while waiting:
        module = waiting.pop()
        if isinstance(module, AdapterDict):
            continue
        parts.append((id(module), type(module), id(module.__dict__.get("forward"))))
        if id(module) in met:
            continue
        met.add(id(module))
        for name, value in module.__dict__.items():
            if type(value) in _PLAIN and name != "training":
                parts.append((name, value))
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if type(tensor) not in PLAIN or tensor.is_meta:
                    return None
                tensors.append(tensor)
                parts.append((name, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
        for name, child in module._modules.items():
            if child is not None:
                parts.append(name)
                waiting.append(child)
    return tuple(parts), tensors
