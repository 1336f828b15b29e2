"""Which submodules are worth a region: repeated blocks first; what lies outside them, as large as possible.

Blocks are identical where `structure_of` is equal.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lora_fx.adapters.attach import attached_to, shown_parameters
from lora_fx.adapters.rawweight.known_experts import interface_of
from lora_fx.models.swap import original_class
from lora_fx.models.walking import modules_of, named_modules_of
from lora_fx.passes.flatten import is_plain_layer
from lora_fx.text import dotted

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def block_regions(model: nn.Module, sites: Iterable[str]) -> list[str]:
    """Return the paths of the regions to try: every block, and for sites outside of blocks their largest ancestor.

    The root becomes a region only where the model has no repeated blocks: KV caches, masks, hooks and checkpointing
    live in Python between the blocks.
    """
    wanted = list(sites)
    if wanted and not _has_blocks(model) and _has_forward(model):
        return [""]
    return inner_regions(model, "", wanted)


def outermost_blocks(model: nn.Module) -> list[str]:
    """Return the paths of the repeated blocks that are in no other one, in model order; a shared one once."""
    found: dict[int, str] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        kinds = Counter(original_class(child) for child in module.children())
        for name, child in reversed(list(module.named_children())):
            here = dotted(path, name)
            if _has_children(child) and _is_block(module, child) and kinds[original_class(child)] > 1:
                found.setdefault(id(child), here)
            else:
                waiting.append((here, child))
    return [path for path, module in named_modules_of(model) if found.get(id(module)) == path]


def inner_regions(model: nn.Module, path: str, sites: Iterable[str]) -> list[str]:
    """Return the regions to try inside a region that cannot be captured: its blocks, its children, the sites."""
    module = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    wanted = [site[len(prefix) :] for site in sites if site.startswith(prefix) and site != path]
    blocks = list(_blocks(module, "", wanted, set()))
    rest = [site for site in wanted if not any(_is_below(site, block) for block in blocks)]
    others = dict.fromkeys(_largest_ancestor(module, site, blocks) for site in rest)
    return [dotted(path, inner) for inner in (*blocks, *others) if inner is not None]


def _blocks(module: nn.Module, path: str, sites: list[str], seen: set[int]) -> Iterator[str]:
    """Yield the repeated blocks with sites in them, in model order."""
    for name, child in module.named_children():
        here = dotted(path, name)
        if id(child) in seen or not any(_is_below(site, here) for site in sites):  # a site itself is not a region
            continue
        seen.add(id(child))
        if _is_block(module, child) and _is_innermost(module, child):
            yield here
        else:
            yield from _blocks(child, here, sites, seen)


def _is_innermost(parent: nn.Module, child: nn.Module) -> bool:
    """Whether the block is repeated, or holds no blocks that are: a graph of many layers could not be shared."""
    if _is_checkpointing_layer(child):
        return True
    return _occurs_twice(child, parent) or not any(map(_has_twins, modules_of(child)))


def _occurs_twice(child: nn.Module, parent: nn.Module) -> bool:
    own = structure_of(child)
    others = (other for other in parent.children() if other is not child and type(other) is type(child))
    return any(structure_of(other) == own for other in others)


def _has_twins(container: nn.Module) -> bool:
    """Whether a container holds two blocks of the same structure."""
    if not isinstance(container, _CONTAINERS):
        return False
    inside = [structure_of(child) for child in container.children() if _has_forward(child) and _has_children(child)]
    return len(inside) > len(set(inside))


def _has_blocks(model: nn.Module) -> bool:
    pairs = ((module, child) for module in model.modules() for child in module.children())
    return any(_has_children(child) and _is_block(module, child) for module, child in pairs)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_block(parent: nn.Module, child: nn.Module) -> bool:
    return _has_forward(child) and (isinstance(parent, _CONTAINERS) or _is_checkpointing_layer(child))


def _is_checkpointing_layer(module: nn.Module) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is not nn.Module.forward


def _is_below(path: str, ancestor: str) -> bool:
    return path.startswith(f"{ancestor}.")


def _largest_ancestor(model: nn.Module, site: str, blocks: list[str]) -> str | None:
    """Return the outermost ancestor of the site, below the root, that contains no block; at the least the site.

    Never routed experts that are one function when they are called (`known_experts`): their graph keeps more.
    """
    for path in itertools.accumulate(site.split(".")[:-1], dotted):
        holds_block = any(block == path or _is_below(block, path) for block in blocks)
        module = model.get_submodule(path)
        if not holds_block and _has_forward(module) and interface_of(original_class(module)) is None:
            return path
    return site if site and _is_layer(model, site) else None


def _is_layer(model: nn.Module, site: str) -> bool:
    """Whether the site is a layer that a graph can call alone, not a raw parameter."""
    path, _, name = site.rpartition(".")
    owner = model.get_submodule(path)
    return name in owner._modules and is_plain_layer(owner.get_submodule(name))


def structure_of(module: nn.Module) -> tuple[Any, ...]:
    """Return what is equal for identical blocks: classes, names, shapes, dtypes, adapters."""
    return tuple(_facts(path, inner) for path, inner in named_modules_of(module))


def _facts(path: str, module: nn.Module) -> tuple[Any, ...]:
    shapes: list[tuple[Any, ...]] = []
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        met = {id(None)}  # one that has two names counts once
        for name, tensor in table.items():
            if id(tensor) not in met:
                met.add(id(tensor))
                shapes.append((name, tuple(tensor.shape), tensor.dtype, tensor.device))
    adapters = tuple(
        (adapter.spec.lora, adapter.spec.mixed, adapter.spec.parameter, adapter.call)
        for adapter in (attached_to(module) if module._modules else ())
    )
    return (path, original_class(module), tuple(shapes), adapters, shown_parameters(module))
