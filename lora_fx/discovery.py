"""The sites of a model: every weight that multiplies an activation, found in a module tree or in a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import is_adapted
from lora_fx.errors import RefusedError
from lora_fx.passes.sitegraph import site_calls
from lora_fx.planning import Inventory
from lora_fx.sites import Site
from lora_fx.twin import refuse_lazy, total_parameters


def take_inventory(model: nn.Module) -> Inventory:
    """Return the sites and modules of a model; it stays unchanged, and needs no values (the meta device will do).

    Raises:
        RefusedError: for a model that is adapted already, compiled or scripted.
    """
    _refuse(model)
    sites = tuple(_graph_sites(model) if isinstance(model, fx.GraphModule) else _module_sites(model))
    modules = tuple(
        (path, sum(p.numel() for p in module.parameters()))
        for path, module in model.named_modules(remove_duplicate=False)
    )
    return Inventory(type(model).__name__, sites, modules, total_parameters(model))


def _refuse(model: nn.Module) -> None:
    refuse_lazy(model)
    if is_adapted(model):
        raise RefusedError(
            "the model is adapted already", advice="lora_fx.remove(model) or lora_fx.merge(model) gives one that is not"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise RefusedError("a TorchScript model cannot be adapted", advice="adapt the nn.Module it was made from")
    if "_orig_mod" in model._modules:
        raise RefusedError("a compiled model cannot be adapted", advice="adapt the model first, then torch.compile it")


def _module_sites(model: nn.Module) -> Iterator[Site]:
    """Yield the sites of a module tree, each module once, in model order."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    ties = _ties(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path:
            aliases = tuple(name for name in names[id(module)] if name != path)
            yield _linear_site(path, module, aliases, ties)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield _attention_site(path, module)


def _linear_site(path: str, module: nn.Linear, aliases: tuple[str, ...], ties: dict[int, tuple[str, ...]]) -> Site:
    weight = module._parameters.get("weight")
    own = {f"{name}.weight" for name in (path, *aliases)}
    tied = () if weight is None else tuple(name for name in ties.get(id(weight), ()) if name not in own)
    stored = next(module.parameters(), None)  # reading a parametrized `weight` would run its power iteration
    return Site(
        path=path,
        op="linear",
        classes=class_names(type(module)),
        shape=(module.out_features, module.in_features),
        dtype=str((module.weight if stored is None else stored).dtype).removeprefix("torch."),
        bias=module.bias is not None,
        aliases=aliases,
        tied_to=tied,
        refusal=_refusal(module),
    )


def class_names(kind: type) -> tuple[str, ...]:
    """Return a class's names as rules may write them: `Linear` and `torch.nn.modules.linear.Linear`."""
    return (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")


def _refusal(module: nn.Linear) -> str | None:
    """Return why a linear cannot be adapted as it is, or None."""
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization; remove it (torch.nn.utils.parametrize) before"
    if module._parameters.get("weight") is None:
        return "its weight is computed at each call (weight_norm, spectral_norm); remove that before"
    if type(module).forward is not nn.Linear.forward:
        return f"class {type(module).__name__} has a forward of its own; what it does with the weight is not known"
    return None


def _attention_site(path: str, module: nn.MultiheadAttention) -> Site:
    weight = module.in_proj_weight
    return Site(
        path=path,
        op="attention",
        classes=class_names(type(module)),
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        bias=module.in_proj_bias is not None,
        refusal="nn.MultiheadAttention's projections are not supported yet",
    )


def _ties(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return for each parameter, by identity, every name under which it or another view of its memory is found."""
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(_memory(parameter), []).append((name, parameter))
    return {
        id(parameter): tuple(name for name, _ in group)
        for group in groups.values()
        if len(group) > 1
        for _, parameter in group
    }


def _memory(tensor: Tensor) -> object:
    if tensor.is_meta:
        return id(tensor)
    try:
        return (tensor.device, tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else id(tensor)
    except RuntimeError:  # tensor subclasses without memory of their own
        return id(tensor)


def _graph_sites(graph_module: fx.GraphModule) -> Iterator[Site]:
    """Yield the sites of a graph in its order, then the linears inside modules that it calls as a whole."""
    calls = Counter(call.path for call in site_calls(graph_module) if call.path)
    ties = _ties(graph_module)
    for path, number in calls.items():
        yield replace(_owner_site(path, graph_module, ties), calls=number, backend="graph")
    for site in _module_sites(graph_module):
        if site.path not in calls:
            yield replace(site, backend_reason="inside a module that the graph calls as a whole")


def _owner_site(path: str, graph_module: fx.GraphModule, ties: dict[int, tuple[str, ...]]) -> Site:
    owner = graph_module.get_submodule(path)
    if isinstance(owner, nn.Linear):
        return _linear_site(path, owner, (), ties)
    weight = owner._parameters["weight"]
    assert weight is not None
    return Site(
        path=path,
        op="linear",
        classes=class_names(nn.Linear),
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        bias=owner._parameters.get("bias") is not None,
        tied_to=tuple(name for name in ties.get(id(weight), ()) if name != f"{path}.weight"),
    )
