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

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.adapters.attach import READS, Attached, all_attached, attached_to
from lora_fx.adapters.factors.kinds import EmbeddingA
from lora_fx.adapters.factors.lora import LoRAFactor, TensorMap
from lora_fx.adapters.factors.moved import MovedA, MovedB
from lora_fx.errors import RefusedError
from lora_fx.models.fsdp import SHARDING, Sharding, parts_before
from lora_fx.models.overrides import parallel_style, parallel_styles
from lora_fx.models.packed import is_packed
from lora_fx.models.quantised import is_quantised
from lora_fx.models.shards import follows, is_kind_of_shards, is_sharded, is_sharded_plainly, placed
from lora_fx.models.swap import original_class
from lora_fx.models.walking import modules_of, parameters_in
from lora_fx.text import dotted

_WITH_ROWS = (LoRAFactor, MovedA, MovedB, EmbeddingA)
"""Factors whose `weight` is A or B itself, or what they are made of row by row and column by column."""
_STYLES = ("", "ColwiseParallel", "RowwiseParallel", "EmbeddingParallel")
"""Styles of transformers' tensor parallelism in which gradients and products of factors are known; empty for none."""
_QUANTISED = "_hf_quantized_needs_local_tp"
"""Attribute by which transformers' tensor parallelism knows layers that multiply by quantised parts."""


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
    facts = [(one.spec.path, why) for one in attached_to(owner) if (why := _obstacle(one, _weight(one)))]
    if facts:
        advice = "leave this layer out of the plan of parallelize_module, or its adapter as plain LoRA"
        raise RefusedError("this adapter cannot be sharded with its weight", list(dict.fromkeys(facts)), advice)


def _obstacle(adapter: Attached, weight: Any) -> str:
    """Return why an adapter cannot be sharded with its weight; empty if it can."""
    lora, owner = adapter.spec.lora, adapter.owner
    kinds, style = (type(adapter.lora_A), type(adapter.lora_B)), parallel_style(owner)
    quantised = is_packed(owner) or getattr(owner, _QUANTISED, False)
    reasons = {
        "code reads its weight, and multiplies by it itself": bool(getattr(type(owner), READS, ())),
        "each call has an adapter of its own": adapter.call is not None,
        "parts of its weight are adapted (slices)": adapter.spec.slices is not None,
        "it acts from an invocation on": bool(lora.invocation),
        "its weight is quantised": quantised or (weight is not None and is_quantised(weight)),
        "transformers multiplies parts of rows, and DoRA's lengths are those of whole ones": bool(style) and lora.dora,
        "transformers adds its bias by itself": bool(style) and lora.bias,
        "its weight is sharded in strides": weight is not None and not is_sharded_plainly(weight),
        "it is no linear": adapter.spec.site.op not in ("linear", "embedding"),
        "its factors are of another kind": not set(kinds) <= set(_WITH_ROWS),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def place_beside(owner: nn.Module) -> None:
    """Shard the factors of a layer as its weight implies, in place, with the first process's values; collective."""
    for adapter in attached_to(owner):
        weight = _weight(adapter)
        if weight is not None and is_sharded(weight):
            _place_all(adapter, weight)


def _place_all(adapter: Attached, weight: Any) -> None:
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


def _parallel(twin: nn.Module, names: Collection[str] | None) -> list[tuple[Attached, Any]]:
    """Return the adapters of a twin beside tensor parallel weights, each with its weight.

    Where FSDP2 has parted these again it is the weight as it was before, without values; other shards are FSDP2's.
    """
    if not _is_split(twin):
        return []
    before = parts_before(twin)
    given = [(one, _weight(one)) for one in _called((one for _, one in all_attached(twin)), names)]
    if SHARDING in vars(twin):
        return [(one, before[id(weight)]) for one, weight in given if id(weight) in before]
    return [(one, weight) for one, weight in given if is_sharded(weight)]


def _weight(adapter: Attached) -> Any:
    """Return the weight as its owner holds it: an offloaded one is not asked for."""
    return adapter.owner._parameters.get(adapter.spec.parameter)


def refuse_unplaceable(twin: nn.Module, names: Collection[str] | None = None) -> None:
    """Raise RefusedError, naming each, if adapters that a twin has got cannot be sharded as their weights are."""
    facts = [(one.spec.path, why) for one, weight in _parallel(twin, names) if (why := _obstacle(one, weight))]
    styles = parallel_styles(twin)
    for path, one in all_attached(twin) if styles else ():
        above = [at for at in styles if styles[at] not in _STYLES and f"{path}.".startswith(f"{at}." if at else "")]
        if above and (names is None or one.spec.adapter in names):
            facts += [(path, f"transformers' style {styles[at]} stands around {at or 'the model'}") for at in above]
    if facts:
        advice = "leave these sites out of the rules, or adapt them as plain LoRA"
        raise RefusedError("these adapters cannot be sharded with their weights", list(dict.fromkeys(facts)), advice)


def refuse_trained_parts(twin: nn.Module, trained: Sequence[tuple[nn.Module, str]]) -> None:
    """Raise RefusedError, naming each, if values are trained in modules that transformers' tensor parallelism runs.

    Where no gradient is wanted it puts parts in their place by itself, and passes by what a module shows.
    """
    styles = parallel_styles(twin) if trained else {}
    paths = {id(module): path for path, module in twin.named_modules()} if styles else {}
    names = [dotted(paths[id(owner)], name) for owner, name in trained] if styles else []
    inside = [name for name in names if any(name.startswith(f"{at}." if at else "") for at in styles)]
    if inside:
        facts = [(name, "its module runs by tp_plan") for name in inside[:8]]
        advice = "leave it out of `train:`, and `bias` out of the rule; adapters are right there"
        raise RefusedError("these values cannot be trained under transformers' tensor parallelism", facts, advice)


def placed_beside(twin: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Return the twin itself, in which new factors are sharded as their weights imply; collective where any is.

    Those beside whole weights get the values of the first process.  With `names`, of adapters that are called so.
    """
    if not _is_split(twin):
        return twin
    for one, weight in _parallel(twin, names):
        _place_all(one, weight)
    for like in _one_of_each_mesh(twin):
        for one in _called((one for _, one in all_attached(twin)), names):
            for held in filter(None, (one.lora_A, one.lora_B, one.magnitude)):
                for tensor in (*held.parameters(), *held.buffers()):
                    if not is_sharded(tensor):
                        shared: Any = placed(tensor, like, follows(like, {}))
                        tensor.detach().copy_(shared.to_local())
    return twin


def _is_split(twin: nn.Module) -> bool:
    """Whether tensor parallelism has split weights of a twin."""
    how: Sharding | None = vars(twin).get(SHARDING)
    if how is not None:
        return bool(how.before)
    return any(map(is_kind_of_shards, {*map(type, parameters_in(modules_of(twin)))}))


def _one_of_each_mesh(twin: nn.Module) -> Collection[Any]:
    """Return a weight of each mesh over which tensor parallelism has split any, as `_parallel` does."""
    weights: Iterable[Any] = parts_before(twin).values() if SHARDING in vars(twin) else twin.parameters()
    return {weight.device_mesh: weight for weight in weights if is_sharded(weight)}.values()


def on_parts(A: LoRAFactor, B: LoRAFactor) -> tuple[TensorMap, TensorMap]:
    """Return the products by what this process holds of two factors.

    transformers multiplies parts of inputs by parts of weights where no gradient is wanted, and sums, or puts side by
    side, what comes of it: so it is with B A, as one of both is whole.
    """
    return _by_part(A.matrix), _by_part(B.matrix)


def _by_part(matrix: Any) -> TensorMap:
    part = matrix.to_local()
    return lambda x: F.linear(x.to(part.dtype), part)


def refuse_rows(owner: nn.Module, path: str) -> None:
    """Raise RefusedError if the weight of a layer is sharded: its rows of a batch cannot be taken apart."""
    if is_sharded(owner._parameters.get("weight")):
        raise RefusedError(
            "adapters cannot be chosen row by row where the weight is sharded",
            [(path, "its weight is a DTensor")],
            "lora_fx.use one adapter for all rows",
        )
