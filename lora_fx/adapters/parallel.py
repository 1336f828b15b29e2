"""Tensor parallelism: adapters go with their base weights when torch shards these.

`torch.distributed.tensor.parallel` (`parallelize_module`) hands a layer to `distribute_module`, which gives it, and all
modules inside, to a function that shards parameters by their names.  Such a function knows the weight and the bias of a
linear, and no adapters.  So it is given a stand-in of an adapted layer, on the layer's own parameters and without the
adapters; these follow the weight afterwards:

    weight sharded along its outputs    B along its outputs, A whole: each process has A x, and its part of B A x
    weight sharded along its inputs     A along its inputs, B whole: the parts of A x are summed, r numbers for each row
    weight whole on every process       both whole

All three are DTensors, as the weight is, so that torch knows what a product is a part of, and sums nothing twice; nor
gradients, which for a whole factor are the sum of what all processes have.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.attach import READS, Attached, all_attached, attached_to
from lora_fx.adapters.factors.kinds import EmbeddingA
from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.adapters.factors.moved import MovedA, MovedB
from lora_fx.errors import RefusedError
from lora_fx.models.fsdp import SHARDING
from lora_fx.models.packed import is_packed
from lora_fx.models.quantised import is_quantised
from lora_fx.models.shards import follows, is_sharded, is_sharded_plainly, placed
from lora_fx.models.swap import original_class

_WITH_ROWS = (LoRAFactor, MovedA, MovedB, EmbeddingA)
"""Factors whose `weight` is A or B itself, or what they are made of row by row and column by column."""


def given_to_shard(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` does of an adapted layer for torch to shard; adapters follow, in place, after that.

    Every process of the mesh does the same: the values are those of the first.

    Raises:
        RefusedError: the adapters cannot be sharded; before anything of this layer is changed.
    """
    refuse_unshardable(owner)
    flags = {name: p.requires_grad for name, p in owner._parameters.items() if p is not None}
    stand_in: nn.Module = object.__new__(original_class(owner))
    vars(stand_in).update(vars(owner), _modules={})  # tables of parameters and buffers are the layer's own
    yield "", stand_in
    for name, flag in flags.items():
        parameter = owner._parameters[name]
        assert parameter is not None
        parameter.requires_grad_(flag)  # SequenceParallel forgets it
    place_beside(owner)


def refuse_unshardable(owner: nn.Module) -> None:
    """Raise RefusedError if the adapters of a layer cannot be sharded with its weight."""
    facts = [(one.spec.path, why) for one in attached_to(owner) if (why := _obstacle(owner, one))]
    if facts:
        advice = "leave this layer out of the plan of parallelize_module, or its adapter as plain LoRA"
        raise RefusedError("this adapter cannot be sharded with its weight", list(dict.fromkeys(facts)), advice)


def _obstacle(owner: nn.Module, adapter: Attached) -> str:
    """Return why an adapter cannot be sharded with its weight; empty if it can."""
    lora, weight = adapter.spec.lora, _weight(adapter)
    kinds = (type(adapter.lora_A), type(adapter.lora_B))
    reasons = {
        "code reads its weight, and multiplies by it itself": bool(getattr(type(owner), READS, ())),
        "each call has an adapter of its own": adapter.call is not None,
        "parts of its weight are adapted (slices)": adapter.spec.slices is not None,
        "it acts from an invocation on": bool(lora.invocation),
        "its weight is quantised": is_packed(owner) or (weight is not None and is_quantised(weight)),
        "its weight is sharded in strides": weight is not None and not is_sharded_plainly(weight),
        "it is no linear": adapter.spec.site.op not in ("linear", "embedding"),
        "its factors are of another kind": not set(kinds) <= set(_WITH_ROWS),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def place_beside(owner: nn.Module, names: Collection[str] | None = None) -> None:
    """Shard the factors of a layer as its weight implies, in place, with the first process's values; collective.

    With `names`, those of adapters that are called so.
    """
    for adapter in _called(attached_to(owner), names):
        weight = owner._parameters[adapter.spec.parameter]
        if weight is None or not is_sharded(weight):
            continue
        outputs, inputs = (0, 1) if adapter.spec.site.layout == "out_in" else (1, 0)
        _place(adapter.lora_A, weight, {inputs: 1})
        _place(adapter.lora_B, weight, {outputs: 0})
        if adapter.magnitude is not None:
            _place(adapter.magnitude, weight, {outputs: 0})


def _place(factor: nn.Module, weight: Any, along: dict[int, int]) -> None:
    """Shard what a factor holds where its weight is sharded along these dimensions; `along` tells the factor's own."""
    placements = follows(weight, along)

    def sharded(tensor: Tensor | None) -> Any:
        return None if tensor is None else placed(tensor, weight, placements)

    for name, parameter in list(factor._parameters.items()):
        if parameter is not None:
            factor._parameters[name] = nn.Parameter(sharded(parameter), parameter.requires_grad)
    for name, buffer in list(factor._buffers.items()):
        factor._buffers[name] = sharded(buffer)


def _called(adapters: Iterable[Attached], names: Collection[str] | None) -> Iterator[Attached]:
    return (one for one in adapters if names is None or one.spec.adapter in names)


def _parallel(twin: nn.Module, names: Collection[str] | None) -> list[Attached]:
    """Return the adapters of a twin beside tensor parallel weights; FSDP2's shards are another matter."""
    if SHARDING in vars(twin):
        return []
    return [one for one in _called((one for _, one in all_attached(twin)), names) if is_sharded(_weight(one))]


def _weight(adapter: Attached) -> Any:
    """Return the weight as its owner holds it: an offloaded one is not asked for."""
    return adapter.owner._parameters.get(adapter.spec.parameter)


def refuse_unplaceable(twin: nn.Module, names: Collection[str] | None = None) -> None:
    """Raise RefusedError, naming each, if adapters that a twin has got cannot be sharded as their weights are."""
    facts = [(one.spec.path, why) for one in _parallel(twin, names) if (why := _obstacle(one.owner, one))]
    if facts:
        advice = "leave these sites out of the rules, or adapt them as plain LoRA"
        raise RefusedError("these adapters cannot be sharded with their weights", list(dict.fromkeys(facts)), advice)


def placed_beside(twin: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Return the twin itself, in which new factors are sharded as their weights imply; collective where any is.

    Those beside whole weights get the values of the first process.  With `names`, of adapters that are called so.
    """
    for owner in {id(one.owner): one.owner for one in _parallel(twin, names)}.values():
        place_beside(owner, names)
    weight: Any = next(map(_weight, _parallel(twin, None)), None)
    for one in () if weight is None else _called((one for _, one in all_attached(twin)), names):
        for held in filter(None, (one.lora_A, one.lora_B, one.magnitude)):
            for tensor in (*held.parameters(), *held.buffers()):
                if not is_sharded(tensor):
                    shared: Any = placed(tensor, weight, follows(weight, {}))
                    tensor.detach().copy_(shared.to_local())
    return twin


def refuse_rows(owner: nn.Module, path: str) -> None:
    """Raise RefusedError if the weight of a layer is sharded: its rows of a batch cannot be taken apart."""
    if is_sharded(owner._parameters.get("weight")):
        raise RefusedError(
            "adapters cannot be chosen row by row where the weight is sharded",
            [(path, "its weight is a DTensor")],
            "lora_fx.use one adapter for all rows",
        )
