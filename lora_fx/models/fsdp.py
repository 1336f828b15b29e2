"""Models that `fully_shard` (FSDP2) has sharded: read as plain modules, and sharded again in the same way.

FSDP2 gives each module that it is called on a subclass of its class, hooks and a state.  A copy of such a module cannot
have these.  So a twin of a sharded model is a tree of plain modules whose parameters are the same shards, and notes how
they were sharded; what is given to callers is sharded again by it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.models.shards import is_sharded, sharded_names, split
from lora_fx.models.swap import layers_of, swap
from lora_fx.models.torch_internals import composed_states
from lora_fx.models.walking import modules_of
from lora_fx.models.wrappers import check_module
from lora_fx.text import dotted

SHARDING = "lora_fx_sharding"
"""Attribute of the twin of a sharded model: its Sharding."""
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_STATES = "__composable_api"
"""What the names of attributes begin with in which torch's composable functions keep their states."""
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_KEYS_OF_HOOKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_SETTINGS = [
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "reduce_scatter_max_input_buffers",
    "gradient_divide_factor",
    "reduce_scatter_unused_params",
    "force_sum_reduction_for_comms",
    "unshard_async_op",
    "unshard_in_backward",
    "_all_reduce_hook",
    "_all_reduce_hook_stream",
    "_all_gather_comm",
    "_reduce_scatter_comm",
]
"""What a group of parameters may have been told since `fully_shard`."""
_PREFETCH = ("_states_to_forward_prefetch", "_states_to_backward_prefetch")


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """What one call of `fully_shard` was given."""

    paths: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model was sharded."""

    groups: tuple[ShardGroup, ...]
    """Those inside of others first."""
    apart: frozenset[str]
    """Names of the parameters that are not sharded."""
    along: dict[str, Any]
    """Of those that are not sharded along their first dimension: how they are."""
    before: dict[str, tuple[Any, Any]]
    """Of those that were DTensors before (tensor parallel): on which mesh, and how they were placed there."""
    meshes: frozenset[Any]
    """On which the shards are; what tensor parallelism alone has split is on others."""
    methods: tuple[tuple[str, str], ...] = ()
    """What `register_fsdp_forward_method` was called on: paths of modules, names of methods."""
    problem: str = ""
    """Why it cannot be done again."""

    def is_shard(self, tensor: Tensor) -> bool:
        """Whether a tensor of the model, or of its twin, is a shard of FSDP2."""
        return is_sharded(tensor) and tensor.detach().device_mesh in self.meshes  # type: ignore[attr-defined]

    def __deepcopy__(self, _memo: object) -> "Sharding":
        return self  # it holds process groups, of which there are no copies


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    return is_of_fully_shard(type(module))


def is_of_fully_shard(kind: type) -> bool:
    """Whether modules of a class are those that `fully_shard` was called on."""
    return getattr(kind, "_get_fsdp_state", None) is not None


def resharded(model: nn.Module) -> nn.Module:
    """Return the model itself, in which every parameter is the shard again.

    After a forward the root's are whole, and rounded where a policy says so; torch's `state_dict` does the same.
    """
    modules = modules_of(model)
    kinds = {kind for kind in {*map(type, modules)} if is_of_fully_shard(kind)}
    for module in modules if kinds else ():
        if type(module) in kinds:
            module.reshard()  # type: ignore[operator]
    return model


def has_parts(model: nn.Module) -> bool:
    """Whether processes hold parts of a model."""
    modules = modules_of(model)
    tensors = {type(t): t for module in modules for t in (*module._parameters.values(), *module._buffers.values())}
    return any(map(is_of_fully_shard, {*map(type, modules)})) or any(map(is_sharded, tensors.values()))


def refuse_sharded(model: nn.Module, what: str, advice: str) -> None:
    """Raise RefusedError if processes hold parts of a model; `what` is what would be wrong then."""
    check_module(model)
    if not has_parts(model):
        return
    marks = (
        (path, "fully_shard was called on it") for path, module in model.named_modules() if is_fully_sharded(module)
    )
    facts = [(path or "(root)", reason) for path, reason in marks]
    facts += [(name, "is a DTensor") for name in sharded_names(model)] if not facts else []
    if facts:
        raise RefusedError(what, facts[:8], advice)


def sharding_of(model: nn.Module) -> Sharding | None:
    """Return how a model is sharded, or was before its twin was made; None if it is not.

    The parameters must be shards: `resharded`.
    """
    known: Sharding | None = model.__dict__.get(SHARDING)
    if known is not None or not any(map(is_of_fully_shard, {*map(type, modules_of(model))})):
        return known
    paths: dict[int, list[str]] = {}
    states: dict[int, Any] = {}
    for path, module in model.named_modules():
        if (state := state_of(module)) is not None:
            states[id(state)] = state
            paths.setdefault(id(state), []).append(path)
    first = next((group for state in states.values() for group in groups_of(state)), None)
    if first is None:
        return None
    groups = [ShardGroup(tuple(paths[key]), _options(state, first)) for key, state in states.items()]
    problems = (_problem(state) for state in states.values())
    held = dict(_held_by_groups(model, states.values()))
    meshes = frozenset(p.sharded_param.device_mesh for p in held.values())
    named: Iterable[tuple[str, Any]] = model.named_parameters(remove_duplicate=False)
    return Sharding(
        groups=tuple(_inner_first(groups)),
        apart=frozenset(name for name, p in named if not (is_sharded(p) and p.device_mesh in meshes)),
        along={name: p.fsdp_placement for name, p in held.items() if p.fsdp_placement.dim != 0},
        before={name: spec for name, p in held.items() if (spec := _placed_before(p)) is not None},
        meshes=meshes,
        methods=tuple((path, name) for path, module in model.named_modules() for name in _registered_on(module)),
        problem=next(filter(None, problems), ""),
    )


def _held_by_groups(model: nn.Module, states: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, what FSDP2 notes of it) of every parameter that is in a group."""
    noted: dict[tuple[int, str], Any] = {}
    for held in (p for state in states for group in groups_of(state) for p in group.fsdp_params):
        info = held._module_info
        places = ((info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True))
        noted |= {(id(module), name): held for module, name in places}
    for path, module in model.named_modules(remove_duplicate=False):
        yield from (
            (dotted(path, name), noted[id(module), name]) for name in module._parameters if (id(module), name) in noted
        )


def _placed_before(parameter: Any) -> tuple[Any, Any] | None:
    """Return how a parameter was placed before, None if it was no DTensor; torch before 2.13 names it otherwise."""
    own = vars(parameter)
    if not parameter.is_dtensor:
        return None
    spec = own.get("_unsharded_dtensor_spec", own.get("_tp_spec"))
    return spec.mesh, spec.placements


def parts_before(twin: nn.Module) -> dict[int, Any]:
    """Return what tensor parallelism had made of a twin's parameters before `fully_shard`, by their identity.

    These have no values; parameters that were no DTensors are not among them.
    """
    how: Sharding | None = vars(twin).get(SHARDING)
    if how is None or not how.before:
        return {}
    named = twin.named_parameters(remove_duplicate=False)
    return {id(p): empty_before(how, name, p) for name, p in named if name in how.before}


def empty_before(how: Sharding, name: str, parameter: Tensor) -> Tensor:
    """Return a tensor without values like a parameter before `fully_shard`: whole, or split by tensor parallelism."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    spec = how.before.get(name)
    return empty if spec is None else split(empty, *spec)


def groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters of a state; torch before 2.12 has one or none."""
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _options(state: Any, other: Any) -> dict[str, Any]:
    """Return what `fully_shard` was given; of a state without parameters of its own as far as another group tells."""
    group = next(iter(groups_of(state)), other)
    return {
        "mesh": group.mesh_info.mesh,
        "reshard_after_forward": _reshard_after_forward(state, group),
        "mp_policy": state._mp_policy,
        "offload_policy": group.offload_policy,
    }


def _reshard_after_forward(state: Any, group: Any) -> bool | int | None:
    after = group.post_forward_mesh_info
    if state._auto_reshard_after_forward:
        return None
    if after is None:
        return False
    size: int = after.shard_mesh_size
    return True if size == group.mesh_info.shard_mesh_size else size


def _problem(state: Any) -> str:
    """Return why a call of `fully_shard` cannot be made again."""
    groups = groups_of(state)
    if len(groups) > 1:
        return "parameters of one module are on several meshes"
    if any(getattr(group.mesh_info, "is_spmd_mesh", False) for group in groups):
        return "it was called with dp_mesh_dims"
    if any(getattr(group.mesh_info, "shard_mesh_size", None) is None for group in groups):
        return "parameters are replicated, and not sharded"
    return ""


def _inner_first(groups: Sequence[ShardGroup]) -> list[ShardGroup]:
    """Return the groups so that those with modules inside of another's come before it."""
    left, ordered = list(groups), list[ShardGroup]()
    while left:
        ready = [one for one in left if not any(_is_inside(other, one) for other in left if other is not one)]
        ordered += ready or left
        left = [one for one in left if one not in ordered]
    return ordered


def _is_inside(one: ShardGroup, other: ShardGroup) -> bool:
    """Whether a module of one group is below a module of the other."""
    pairs = ((own, path) for own in one.paths for path in other.paths if own and own != path)
    return any(not path or own.startswith(f"{path}.") for own, path in pairs)


# -- a module as it was before


def plain_shell(module: nn.Module) -> nn.Module | None:
    """Return a module with a sharded one's attributes, of its class before, without FSDP2's hooks; None for others.

    Tables of submodules, parameters and buffers are the module's own: for `copy.deepcopy`, which copies them.
    """
    own = vars(module)
    hooks = {name: table for name in _HOOKS if (table := _without_hooks(own.get(name))) is not None}
    if not hooks and not any(name in own for name in _MARKS) and not is_fully_sharded(module):
        return None
    kind, mixins = layers_of(type(module))
    shell: nn.Module = object.__new__(_class_before(kind))
    left_out = _registered_on(module)
    kept = {name: value for name, value in own.items() if not is_mark(name) and name not in left_out}
    for name, value in kept.items():  # a method bound to the sharded module would be copied with it
        if isinstance(value, MethodType) and value.__self__ is module:
            kept[name] = MethodType(value.__func__, shell)
    vars(shell).update(kept | hooks)
    for mixin in mixins:
        swap(shell, mixin)
    return shell


def _class_before(kind: type) -> type:
    if not is_of_fully_shard(kind):
        return kind
    before: type = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
    return before


def is_mark(name: str) -> bool:
    """Whether FSDP2 keeps something of its own in an attribute of this name."""
    return name in _MARKS or str(name).startswith(_STATES)


def _registered_on(module: nn.Module) -> list[str]:
    """Return the names of the methods that `register_fsdp_forward_method` has replaced on a module."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, MethodType)}
    homes = {name: str(getattr(value.__func__, "__globals__", {}).get("__name__", "")) for name, value in own.items()}
    return [name for name, home in homes.items() if home.startswith("torch.distributed.fsdp.")]


def _without_hooks(table: Any) -> Any:
    """Return a table of hooks without those of FSDP2; None if it has none of them."""
    if not table or not any(map(_is_of_fsdp, table.values())):
        return None
    return type(table)((key, hook) for key, hook in table.items() if not _is_of_fsdp(hook))


def _is_of_fsdp(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)  # load_state_dict's are wrapped
    home = getattr(getattr(inner, "func", inner), "__module__", "")
    return str(home).startswith("torch.distributed.fsdp.")


def take_apart(model: nn.Module, how: Sharding) -> Callable[[], None]:
    """Make the modules of a sharded model plain ones with the same shards, in place.

    Returns what tells the groups, once the model is sharded again, what they had been told since `fully_shard`.

    Raises:
        RefusedError: gradients are there that have not been reduced, or the root is outside; nothing is changed then.
    """
    states = {id(state): state for module in model.modules() if (state := state_of(module)) is not None}.values()
    groups = [group for state in states for group in groups_of(state)]
    held = (p.unsharded_accumulated_grad is not None for group in groups for p in group.fsdp_params)
    if any(held) or any(getattr(group, "_partial_reduce_output", None) is not None for group in groups):
        advice = "call this after a backward with set_requires_gradient_sync(True)"
        raise RefusedError("processes hold gradients that have not been reduced", [("(root)", "accumulated")], advice)
    roots = {state._is_root for state in states}
    if False in roots and True not in roots:
        raise RefusedError(
            "the model is a part of one that FSDP2 runs as a whole",
            [("(root)", "its root is outside")],
            "ask the whole one",
        )
    told = [(state._modules[0], _told(state)) for state in states]
    for module in model.modules():
        _make_plain(module)
    vars(model)[SHARDING] = how
    return lambda: _tell(told)


def state_of(module: nn.Module) -> Any:
    return module._get_fsdp_state() if is_fully_sharded(module) else None  # type: ignore[operator]


def _told(state: Any) -> tuple[list[dict[str, Any]], dict[str, list[nn.Module]]]:
    settings = [{n: vars(group)[n] for n in _SETTINGS if n in vars(group)} for group in groups_of(state)]
    return settings, {name: [other._modules[0] for other in getattr(state, name)] for name in _PREFETCH}


def _tell(told: Sequence[tuple[nn.Module, tuple[list[dict[str, Any]], dict[str, list[nn.Module]]]]]) -> None:
    for module, (settings, prefetched) in told:
        state = state_of(module)
        for group, own in zip(groups_of(state), settings, strict=False):
            vars(group).update(own)
        for name, modules in prefetched.items():
            setattr(state, name, [state_of(other) for other in modules])


def _make_plain(module: nn.Module) -> None:
    """Take FSDP2 off one module, in place: tables of hooks stay, as what was returned for others' hooks needs them."""
    own = vars(module)
    for table in (own[name] for name in _HOOKS if name in own):
        for key in [key for key, hook in table.items() if _is_of_fsdp(hook)]:
            del table[key]
            for name in _KEYS_OF_HOOKS:
                own[name].pop(key, None)
    kind, mixins = layers_of(type(module))
    if is_of_fully_shard(type(module)):
        module.__class__ = _class_before(kind)
        for mixin in mixins:
            swap(module, mixin)
    for name in [name for name in own if is_mark(name)]:
        del own[name]
    composed_states.pop(module, None)
