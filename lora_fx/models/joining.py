"""New parameters for models that `fully_shard` (FSDP2) has sharded: they join the groups of the modules they stand in.

What is decided of such a model is decided on its outline, a model without values in which every parameter is whole.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn

from lora_fx.errors import RefusedError
from lora_fx.models.between import between_calls
from lora_fx.models.fsdp import SHARDING, Sharding, has_parts, resharded, sharding_of, take_apart
from lora_fx.models.overrides import unknown_parallel, without_parallel
from lora_fx.models.packed import holds_shards, packed_layers
from lora_fx.models.resharding import sharded_again
from lora_fx.models.shards import is_sharded, part_of, whole
from lora_fx.models.twin import make_twin

_PLAN = "load it without tp_plan; lora_fx.apply, then parallelize_module"
_BEFORE = "lora_fx.apply or lora_fx.load first, also on the meta device; parallelize_module and the like then"


def refuse_unjoinable(model: nn.Module) -> None:
    """Raise RefusedError if processes hold parts of a model in a way that leaves new parameters in no shard group."""
    if not has_parts(model):
        return
    what = "processes hold parts of this model: new factors would be in nobody's group"
    if isinstance(model, fx.GraphModule):
        raise RefusedError(what, [("(root)", "a GraphModule was sharded")], "lora_fx.apply before")
    if codes := [(path, "its codes are sharded") for path, layer in packed_layers(model) if holds_shards(layer)]:
        raise RefusedError("adapters do not join shards of a quantised base", codes[:8], _BEFORE)
    if paths := unknown_parallel(model):
        facts = [(path, "transformers' forward stands in the place of the class's") for path in paths[:8]]
        raise RefusedError("adapters would not be seen by transformers' tensor parallelism (tp_plan)", facts, _PLAN)
    sharding = sharding_of(resharded(model))
    if sharding is not None and sharding.problem:  # without a sharding the weights tell how factors are placed
        raise RefusedError(what, [("(root)", sharding.problem)], _BEFORE)


def outline(model: nn.Module) -> nn.Module:
    """Return the model itself; of one that is sharded, a twin on the meta device whose parameters are whole."""
    return without_values_of(model) if has_parts(model) else model


def without_values_of(model: nn.Module) -> nn.Module:
    """Return a twin of the model on the meta device, whose parameters are whole; the model stays unchanged."""
    twin = make_twin(model, freeze=False)
    vars(twin).pop(SHARDING, None)
    without_parallel(twin)
    empty: dict[int, Tensor] = {}
    for module in twin.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = empty.setdefault(id(tensor), _empty(tensor))  # type: ignore[assignment]
    return twin


def _empty(tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        made = tensor.detach().to("meta")
    else:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def joined(twin: nn.Module) -> nn.Module:
    """Return the model itself, in place sharded as the model was that it is a twin of, with what is new in its groups.

    New parameters get the values of the first process.  Collective; of a model that is not sharded the model as it is.

    Raises:
        RefusedError: something new is in no group, or a group would train several dtypes; before anything is changed.
    """
    how: Sharding | None = vars(twin).get(SHARDING)
    if how is None:
        return twin
    refuse_unfit_for_groups(twin)
    new = dict(_new(twin, how))
    model = sharded_again(twin)
    for name, parameter in model.named_parameters():
        if name in new and not parameter.is_meta:
            with torch.no_grad():
                parameter.copy_(part_of(whole(new[name]), parameter, of_first=True))
    return model


def refuse_unfit_for_groups(twin: nn.Module) -> None:
    """Raise what `joined` raises, of a model that is to be sharded again; nothing is changed."""
    how: Sharding | None = vars(twin).get(SHARDING)
    if how is not None:
        _refuse_outside(twin, how)
        _refuse_dtypes(twin, how)


@contextlib.contextmanager
def apart(model: nn.Module, needed: bool = True) -> Iterator[None]:
    """Let a sharded model be plain modules with the same shards in this block, in place; sharded again at its end.

    What is new joins the groups, as by `joined`: whoever adds it asks `refuse_unfit_for_groups` before the end.  What
    is gone is in none.  Shards stay the same objects, which optimizers hold.  Of a model that `fully_shard` has not
    sharded nothing happens; nor, if it is not `needed`, of one that is refused.

    Raises:
        RefusedError: as `refuse_unjoinable` and `take_apart`; before anything is changed.
    """
    is_shared = has_parts(model)
    with between_calls(model) if is_shared else contextlib.nullcontext():
        tell = _taken_apart(model, needed) if is_shared else None
        try:
            yield
        finally:
            if tell is not None:
                joined(model)
                tell()


def _taken_apart(model: nn.Module, needed: bool) -> Callable[[], None] | None:
    try:
        if SHARDING in vars(model):
            return None
        refuse_unjoinable(model)
        how = sharding_of(model)
        return None if how is None else take_apart(model, how)
    except RefusedError:
        if needed:
            raise
        return None


def _new(twin: nn.Module, how: Sharding) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that came after the model was sharded, as they are before `fully_shard`."""
    for name, parameter in twin.named_parameters():
        if name not in how.apart and not how.is_shard(parameter):
            yield name, parameter.detach()


def _refuse_outside(twin: nn.Module, how: Sharding) -> None:
    """Raise RefusedError for new parameters in modules that are in no group: their gradients would not be reduced."""
    inside = [path for group in how.groups for path in group.paths]
    lost = [name for name, _ in _new(twin, how) if not any(_is_in(name, path) for path in inside)]
    if lost:
        raise RefusedError(
            "new factors would be in nobody's shard group, and processes would train them apart",
            [(name, "is in no module of fully_shard") for name in lost[:8]],
            "call fully_shard on the whole model too, last",
        )


def _is_in(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _refuse_dtypes(twin: nn.Module, how: Sharding) -> None:
    """Raise RefusedError for groups whose trained parameters have several dtypes, which FSDP2 refuses in a forward."""
    left = dict(twin.named_parameters())
    facts = []
    for group in how.groups:  # the inner ones first
        own = [name for name in left if name not in how.apart and any(_is_in(name, path) for path in group.paths)]
        trained = {name: parameter for name in own if (parameter := left.pop(name)).requires_grad}
        dtypes = dict.fromkeys(parameter.dtype for parameter in trained.values())
        if len(dtypes) > 1:
            told = (f"{_examples(trained, dtype)} {str(dtype).removeprefix('torch.')}" for dtype in dtypes)
            facts.append((" + ".join(path or "(root)" for path in group.paths), "; ".join(told)))
    if facts:
        raise RefusedError(
            "fully_shard wants one dtype of all that is trained in a group",
            facts,
            "fully_shard these modules apart, or train one dtype: `model.float()` of them before fully_shard",
        )


def _examples(trained: dict[str, nn.Parameter], dtype: torch.dtype) -> str:
    names = [name for name, parameter in trained.items() if parameter.dtype == dtype]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
