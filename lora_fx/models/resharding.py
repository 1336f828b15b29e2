"""Twins of models that `fully_shard` (FSDP2) has sharded are sharded again in the same way, and so given to callers.

A parameter that tensor parallelism had split before is split in the same way first: torch knows from it on which mesh
the shards of its parts are.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_fx.errors import RefusedError
from lora_fx.models.fsdp import SHARDING, Sharding, empty_before, groups_of, state_of
from lora_fx.models.shards import is_sharded, split
from lora_fx.text import dotted


def sharded_again(model: nn.Module) -> nn.Module:
    """Return the model itself, in place sharded as the model was that it is a twin of; one of another as it is.

    Parameters that are shards stay those shards; plain ones in the place of shards, and new ones, are sharded, from the
    values that every process has.  What was no shard stays so.  Nothing is sent.

    Raises:
        RefusedError: it was sharded in a way that cannot be done again; before anything is changed.
    """
    how: Sharding | None = vars(model).get(SHARDING)
    if how is None:
        return model
    if how.problem:
        advice = "lora_fx.save writes the adapter, which loads beside a base that is not sharded"
        raise RefusedError(
            "a model that is sharded in this way cannot be given back", [("(root)", how.problem)], advice
        )
    del vars(model)[SHARDING]
    shards = _with_empty_places(model, how)
    library = importlib.import_module("torch.distributed.fsdp")
    named = list(model.named_parameters(remove_duplicate=False))
    ignored = {parameter for name, parameter in named if name in how.apart}
    along = {id(parameter): how.along[name] for name, parameter in named if name in how.along}
    modules = dict(model.named_modules(remove_duplicate=False))
    for group in how.groups:
        inside = [modules[path] for path in group.paths if path in modules]
        if inside:
            one_or_all = inside[0] if len(inside) == 1 else inside
            placed: Callable[[nn.Parameter], Any] | None = (lambda p: along.get(id(p))) if along else None
            library.fully_shard(one_or_all, **group.options, shard_placement_fn=placed, ignored_params=ignored or None)
    for path, name in how.methods:
        if path in modules and name not in vars(modules[path]):  # of a model that was taken apart they are there
            library.register_fsdp_forward_method(modules[path], name)
    _put_back(model, shards)
    return model


def _with_empty_places(model: nn.Module, how: Sharding) -> dict[tuple[int, str], nn.Parameter]:
    """Put parameters without values in the place of a model's shards, in place; return these by where they belong.

    Plain parameters in the place of those that tensor parallelism had split are split alike.
    """
    made: dict[int, nn.Parameter] = {}
    shards: dict[tuple[int, str], nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = dotted(path, name)
            if how.is_shard(parameter):
                shards[id(module), name] = parameter
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(empty_before(how, full, parameter), parameter.requires_grad)
            elif full in how.before and not is_sharded(parameter) and id(parameter) not in made:
                part = split(parameter.detach(), *how.before[full])
                made[id(parameter)] = nn.Parameter(part, parameter.requires_grad)
            if id(parameter) in made:
                module._parameters[name] = made[id(parameter)]
    return shards


def _put_back(model: nn.Module, shards: dict[tuple[int, str], nn.Parameter]) -> None:
    states: dict[int, Any] = {}
    for module in model.modules():
        for name in list(module._parameters):
            if (id(module), name) in shards:
                module._parameters[name] = shards[id(module), name]
        if (state := state_of(module)) is not None:
            states[id(state)] = state
    for state in states.values():
        for group in groups_of(state):
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()
