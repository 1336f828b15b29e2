"""A state that has just the tensors of an adapter, in their shapes: found in one walk, and copied in one step.

What is not as plain as that (a lower rank, another device or dtype, PiSSA, slices, shards, wrappers, an error) is for
`swapping` to take apart, which says what is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.dicts import KEPT_TARGETS, AdapterDict
from lora_fx.adapters.factors.dora import DoRAMagnitude
from lora_fx.adapters.factors.kinds import ConvolutionA, ConvolutionB, EmbeddingA, SharedFactor
from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.files.adapter.keptfile import KeptFile, Stamp
from lora_fx.models.fsdp import is_of_fully_shard
from lora_fx.models.shards import is_kind_of_shards
from lora_fx.models.together import Alike
from lora_fx.models.walking import weights_of
from lora_fx.models.wrappers import WRAPPING

_WEIGHT = ".weight"
_MODULES = attrgetter("_modules")
_VALUES = ("lora_A", "lora_B", "lora_magnitude_vector")
_PLAIN = frozenset({LoRAFactor, EmbeddingA, ConvolutionA, ConvolutionB, SharedFactor, DoRAMagnitude})
"""Of what modules beside a weight `weight` is all that a state has."""


def plain_copies(
    tuned: nn.Module, state: Mapping[str, Tensor], adapter: str
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the tensors of an adapter and the values for them in a state, if they can be copied as they are; or None.

    All of them are there, finite, and of the same shape, dtype and device; no process holds parts of the model.
    """
    kept = targets_in(tuned, adapter)
    found = {} if kept is None else kept.targets
    if kept is None or len(found) != len(state):
        return None
    name = adapter if next(iter(found), None) in state else _name_in(state)
    targets, values = list(found.values()), list(map(state.get, kept.called(name)))
    given = [value for value in values if isinstance(value, Tensor)]
    if len(given) < len(values):
        return None
    if kept.alike is None or not kept.alike.holds(targets, given):
        kept.alike = Alike.of(targets, given)
    if kept.alike is None or kept.alike.share_memory(targets, given):
        return None
    return (targets, given) if kept.alike.surely_finite(given) else None


@dataclass(slots=True, eq=False)
class KeptTargets:
    """What a walk has found, and of what; copies and pickles of a model begin without it.

    The model itself is not held: it would hold itself, and its memory would wait for the garbage collector.
    """

    adapter: str = ""
    inside: tuple[nn.Module, ...] = ()
    """What was walked, but for the model itself."""
    names: Sequence[str] = ()
    """Of all children, in the order of `inside`."""
    children: Sequence[nn.Module | None] = ()
    kinds: Sequence[type] = ()
    owners: tuple[nn.Module, ...] = ()
    """The modules that hold the tensors, each its own as `weight`."""
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors, by their keys in a state."""
    homes: Mapping[str, nn.Module] = field(default_factory=dict)
    """By the key of each tensor, the module beside whose weight it is."""
    alike: Alike | None = None
    """Of the tensors and the values of the last swap."""
    files: dict[Stamp, KeptFile] = field(default_factory=dict)
    """Of the last swaps that took the values of a file as they are."""
    keys: dict[str, Sequence[str]] = field(default_factory=dict)
    """Of the tensors, in states that call the adapter otherwise: those of the last such state."""

    def still_holds(self, tuned: nn.Module) -> bool:
        """Whether a walk would find the same: the same modules of the same classes, with the same tensors."""
        names, children, kinds = _seen((tuned, *self.inside))
        return (
            (names, kinds) == (self.names, self.kinds)
            and all(map(is_, children, self.children))  # as many as there are names
            and all(map(is_, weights_of(self.owners), self.targets.values()))
        )

    def called(self, name: str) -> Sequence[str]:
        """Return the keys of the tensors where the adapter has another name."""
        if name not in self.keys:
            cut, end = len(self.adapter) + len(_WEIGHT), name + _WEIGHT
            self.keys = {name: [key[:-cut] + end for key in self.targets]}
        return self.keys[name]

    def __reduce__(self) -> Any:
        return KeptTargets, ()

    def __deepcopy__(self, _memo: object) -> "KeptTargets":
        return KeptTargets()


def targets_in(tuned: nn.Module, adapter: str) -> KeptTargets | None:
    """Return the tensors of an adapter; None where one walk does not tell all of them."""
    kept: KeptTargets | None = tuned.__dict__.get(KEPT_TARGETS)
    if kept is None or kept.adapter != adapter or not kept.still_holds(tuned):
        kept = _walked(tuned, adapter)
        if kept is not None:
            tuned.__dict__[KEPT_TARGETS] = kept
    return kept


def _walked(tuned: nn.Module, adapter: str) -> KeptTargets | None:
    """Return the tensors of an adapter, and where they were found."""
    found: dict[str, Tensor] = {}
    walked: dict[int, nn.Module] = {}
    homes: dict[str, nn.Module] = {}
    owners: list[nn.Module] = []
    kinds: set[type] = set()
    end = adapter + _WEIGHT
    waiting: list[tuple[str, nn.Module]] = [("", tuned)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in walked:
            continue
        walked[id(module)] = module
        kinds.add(type(module))
        for table in (module._parameters, module._buffers):
            if table:
                kinds.update(map(type, table.values()))
        for name, child in reversed(module._modules.items()):
            if child is None:
                continue
            if name in WRAPPING:
                return None
            if type(child) is not AdapterDict:
                if name in _VALUES:
                    return None
                waiting.append((f"{path}.{name}" if path else name, child))
            elif name in _VALUES:
                walked[id(child)] = child
                own = child._modules.get(adapter)
                if own is None:
                    continue
                weight = own._parameters.get("weight")
                if type(own) not in _PLAIN or weight is None or weight.is_meta:
                    return None
                kinds.add(type(weight))
                owners.append(own)
                key = f"{path}.{name}.{end}" if path else f"{name}.{end}"
                found[key], homes[key] = weight, module
    if any(map(is_of_fully_shard, kinds)) or any(map(is_kind_of_shards, kinds)):
        return None
    names, children, classes = _seen((*walked.values(),))
    return KeptTargets(adapter, (*walked.values(),)[1:], names, children, classes, tuple(owners), found, homes)


def _seen(modules: Sequence[nn.Module]) -> tuple[list[str], list[nn.Module | None], list[type]]:
    """Return the names of all children of modules, the children, and the modules' own classes."""
    tables = list(map(_MODULES, modules))
    children = chain.from_iterable(map(dict.values, tables))
    return list(chain.from_iterable(tables)), list(children), list(map(type, modules))


def _name_in(state: Mapping[str, Tensor]) -> str:
    """Return the name of the adapter that the first key of a state is of."""
    parts = next(iter(state), "").rsplit(".", 2)
    return parts[1] if len(parts) == 3 else ""
