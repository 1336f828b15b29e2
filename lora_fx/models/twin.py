"""A frozen twin of a model, its structural copy: own modules of the same classes, parameters on shared storage.

The caller's model keeps its flags, values and behaviour; no weight is copied.
"""

import types
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lora_fx.errors import RefusedError
from lora_fx.models.copying import copied_alone, copied_tree, passes_on_copying
from lora_fx.models.fsdp import SHARDING, plain_shell, resharded, sharding_of
from lora_fx.models.modes import normal, normal_tensors
from lora_fx.models.offload import offloading_hook
from lora_fx.models.overrides import accelerate_hooks, follow_class, rebind
from lora_fx.models.packed import copies_of_packed, settle_packed_
from lora_fx.models.shards import is_sharded
from lora_fx.models.torch_internals import deepcopy
from lora_fx.models.walking import modules_of, parameters_in

_MESHES = ("_device_mesh", "_mesh_manager")


def make_twin(model: nn.Module, freeze: bool = True) -> nn.Module:
    """Return a copy of the model's structure whose parameters share the model's storage; the model stays unchanged.

    Parameters that are tied in the model are tied in the twin.  Buffers are copied, so that running statistics do not
    leak back.  With `freeze`, no parameter of the twin requires a gradient; otherwise each keeps its flag.  Of a model
    that FSDP2 has sharded, the twin's modules are plain ones with the same shards (`lora_fx.models.fsdp`).

    Raises:
        RefusedError: if the model has uninitialised (lazy) parameters or cannot be copied; says which part.
    """
    return twin_without(model, modules_of(model), lambda _: None, freeze)


@normal_tensors()
def twin_without(
    model: nn.Module, modules: Sequence[nn.Module], under: Callable[[nn.Module], nn.Module | None], freeze: bool
) -> nn.Module:
    """Return a twin as `make_twin` does, without the layers that something has put around others.

    Args:
        model: stays unchanged.
        modules: all of it, each before those inside of it; the model is not asked for them.
        under: returns what a layer is put around, and stands in its place in the twin; None for a module that stays.
        freeze: as for `make_twin`.

    Raises:
        RefusedError: as `make_twin`.
    """
    refuse_lazy(model)
    _refuse_slots(model)
    sharding = sharding_of(resharded(model))
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    memo: dict[int, object] = {id(p): _alias(p, freeze) for p in parameters}
    memo |= {id(held): own for module in modules for held, own in copies_of_packed(module)}
    memo |= {id(t): normal(t).detach() for t in _computed_tensors(modules)}
    memo |= {id(kept): kept for kept in (*_kept_by_hooks(modules), *_meshes(modules))}
    try:
        for layer in reversed(modules):  # those inside of others first
            base = under(layer)
            if base is None and sharding is not None:
                base = plain_shell(layer) or (layer if passes_on_copying(layer) else None)
            if base is not None:
                memo[id(layer)] = copied_alone(base, memo, layer) if passes_on_copying(base) else deepcopy(base, memo)
        twin = copied_tree(model, memo)
    except Exception as error:
        parts = list(_uncopyable_parts(model)) or [("(root)", f"{type(error).__name__}: {error}")]
        raise RefusedError(
            "the model cannot be copied, so it cannot be adapted without changing it",
            parts,
            "give these attributes a __deepcopy__, or remove them before",
        ) from error
    rebind(twin, memo)
    follow_class(twin)
    settle_packed_(twin)
    if sharding is not None:
        vars(twin)[SHARDING] = sharding
    return twin


def _kept_by_hooks(modules: Sequence[nn.Module]) -> Iterator[object]:
    """Yield the tables in which accelerate's hooks keep offloaded weights: they serve both models."""
    for module in modules:
        for hook in accelerate_hooks(module):
            tables = (getattr(hook, "weights_map", None), getattr(hook, "tied_params_map", None))
            yield from (table for table in tables if table is not None)


def _meshes(modules: Sequence[nn.Module]) -> Iterator[object]:
    """Yield the meshes that transformers' models hold (`tp_plan`): of process groups there are no copies."""
    for module in modules:
        yield from (vars(module)[name] for name in _MESHES if name in vars(module))


def _alias(parameter: nn.Parameter, freeze: bool) -> Tensor:
    flag = parameter.requires_grad and not freeze
    if type(parameter) is not nn.Parameter and not parameter.requires_grad and not is_sharded(parameter):
        return parameter  # quantised weights carry state that detach() drops; frozen, they can serve both models
    alias = normal(parameter).detach()
    if not isinstance(alias, nn.Parameter):
        alias = nn.Parameter(alias, requires_grad=flag)
    alias.requires_grad_(flag)
    vars(alias).update(vars(parameter))
    return alias


def refuse_lazy(model: nn.Module) -> None:
    """Raise RefusedError, naming each, if the model has parameters without a shape."""
    kinds = {*map(type, parameters_in(modules_of(model)))}
    if any(issubclass(kind, UninitializedParameter) for kind in kinds):
        lazy = [name for name, parameter in model.named_parameters() if _is_lazy(parameter)]
        raise RefusedError(
            "the model has parameters without a shape",
            [(name, "not initialised") for name in lazy],
            "call the model once, so that its lazy modules learn their sizes",
        )


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, UninitializedParameter)


def _refuse_slots(model: nn.Module) -> None:
    """Raise RefusedError, naming each, if modules keep attributes in slots: a copy, torch's too, comes without them."""
    known = {kind: _slots_of(kind) for kind in set(map(type, modules_of(model)))}
    if any(known.values()):
        slots = [(path, name) for path, module in model.named_modules() for name in known[type(module)]]
        raise RefusedError(
            "modules keep attributes in __slots__, which copies of a module do not have",
            [(path or "(root)", name) for path, name in slots],
            "leave __slots__ out of the class",
        )


def _slots_of(kind: type) -> tuple[str, ...]:
    descriptors = (value for base in kind.__mro__ for value in vars(base).values())
    return tuple(value.__name__ for value in descriptors if isinstance(value, types.MemberDescriptorType))


def _computed_tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Yield plain tensor attributes that autograd computed (weight_norm's weight): deepcopy refuses them."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _uncopyable_parts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) for every attribute of a module that copy.deepcopy cannot copy."""
    shared: dict[int, object] = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                deepcopy(value, dict(shared))
            except Exception as error:
                yield f"{path}.{name}".lstrip("."), f"{type(error).__name__}: {error}"


def is_meta(model: nn.Module) -> bool:
    """Whether the model has no values: all its parameters are on the meta device, and none is offloaded."""
    modules = modules_of(model)
    parameters = parameters_in(modules)
    on_meta = bool(parameters) and all(p.device == torch.device("meta") for p in parameters)
    return on_meta and not any(map(offloading_hook, modules))
