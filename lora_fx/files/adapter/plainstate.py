"""A state that has just the tensors of an adapter, in their shapes: found in one walk, and copied in one step.

What is not as plain as that (a lower rank, another device or dtype, PiSSA, slices, shards, wrappers, an error) is for
`swapping` to take apart, which says what is wrong.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lora_fx.adapters.dicts import AdapterDict
from lora_fx.adapters.factors.dora import DoRAMagnitude
from lora_fx.adapters.factors.kinds import ConvolutionA, ConvolutionB, EmbeddingA, SharedFactor
from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.models.fsdp import is_of_fully_shard
from lora_fx.models.shards import is_kind_of_shards
from lora_fx.models.together import are_alike, share_memory, surely_finite
from lora_fx.models.wrappers import WRAPPING

_WEIGHT = ".weight"
_VALUES = ("lora_A", "lora_B", "lora_magnitude_vector")
_PLAIN = frozenset({LoRAFactor, EmbeddingA, ConvolutionA, ConvolutionB, SharedFactor, DoRAMagnitude})
"""Of what modules beside a weight `weight` is all that a state has."""


def plain_copies(
    tuned: nn.Module, state: Mapping[str, Tensor], adapter: str
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the tensors of an adapter and the values for them in a state, if they can be copied as they are; or None.

    All of them are there, finite, and of the same shape, dtype and device; no process holds parts of the model.
    """
    found = _targets(tuned, adapter)
    if found is None or len(found) != len(state):
        return None
    name = adapter if next(iter(found), None) in state else _name_in(state)
    cut, end = len(adapter) + len(_WEIGHT), name + _WEIGHT
    values = [state.get(key if name == adapter else key[:-cut] + end) for key in found]
    targets = list(found.values())
    given = [value for value in values if isinstance(value, Tensor)]
    if len(given) < len(values) or not are_alike(targets, given) or share_memory(targets, given):
        return None
    return (targets, given) if surely_finite(given) else None


def _targets(tuned: nn.Module, adapter: str) -> dict[str, Tensor] | None:
    """Return the tensors of an adapter by their keys in a state; None where one walk does not tell all of them."""
    found: dict[str, Tensor] = {}
    kinds: set[type] = set()
    met, end = set[int](), adapter + _WEIGHT
    waiting: list[tuple[str, nn.Module]] = [("", tuned)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in met:
            continue
        met.add(id(module))
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
            elif name in _VALUES and (own := child._modules.get(adapter)) is not None:
                weight = own._parameters.get("weight")
                if type(own) not in _PLAIN or weight is None or weight.is_meta:
                    return None
                kinds.add(type(weight))
                found[f"{path}.{name}.{end}" if path else f"{name}.{end}"] = weight
    is_sharded = any(map(is_of_fully_shard, kinds)) or any(map(is_kind_of_shards, kinds))
    return None if is_sharded else found


def _name_in(state: Mapping[str, Tensor]) -> str:
    """Return the name of the adapter that the first key of a state is of."""
    parts = next(iter(state), "").rsplit(".", 2)
    return parts[1] if len(parts) == 3 else ""
