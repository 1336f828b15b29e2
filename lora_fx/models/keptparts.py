"""A block on one process's parts of its weights, kept from call to call while what it was made of is the same.

What can change it is looked at before each call, object by object: attributes, children, parameters with the parts that
they hold, and hooks.  A block whose attribute is another object, though an equal one, is made again.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

from lora_fx.models.parts import HOOKS, LayerPart, has_own_hooks, on_parts_of
from lora_fx.models.shards import is_sharded, local_part
from lora_fx.models.walking import modules_of

_TABLES = ("_parameters", "_buffers", "_modules", *HOOKS)
_SHARED_BY = attrgetter("_local_tensor", "_spec", "requires_grad")
"""What of a DTensor can be replaced in place, as `nn.Module.to` does."""


class KeptParts:
    """A stand-in of a block, and what it was made of; of the block itself nothing is held."""

    def __init__(self, block: nn.Module, parts: Mapping[str, LayerPart], but: str) -> None:
        """Make it; `but` is an attribute of the block that counts for nothing here, and is left out."""
        self._but = but
        self.module = on_parts_of(block, parts, False)
        self.module.__dict__.pop(but, None)
        layers = {path: block.get_submodule(path) for path in parts}
        inside = [module for layer in layers.values() for module in modules_of(layer)]
        shells = [block.get_submodule(path) for path in _above(parts) if path]
        self.hooked = next((path for path, layer in layers.items() if has_own_hooks(layer)), None)
        """A split layer around which there is a hook of the user's."""
        self._modules = [*shells, *inside]
        self._tables = [block._modules, *(module._modules for module in shells)]
        self._tables += [vars(module)[name] for module in inside for name in _TABLES]
        held = chain.from_iterable((*module._parameters.values(), *module._buffers.values()) for module in inside)
        self._shards = [tensor for tensor in held if tensor is not None and is_sharded(tensor)]
        self._trained = list(self._found_trained(layers))
        self._made_of = self._facts(block)

    def is_of(self, block: nn.Module) -> bool:
        """Whether it would be made of the same objects now."""
        now = self._facts(block)
        return len(now) == len(self._made_of) and all(map(is_, now, self._made_of))

    def renew(self) -> None:
        """Let gradients of the next call reach the block's parameters."""
        for table, name, tensor in self._trained:
            table[name] = local_part(tensor, False)

    def _found_trained(self, layers: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Yield (table of the stand-in, name there, the block's) of what gradients pass through."""
        for path, layer in layers.items() if torch.is_grad_enabled() else ():
            for name, tensor in layer.named_parameters(path, remove_duplicate=False):
                owner, _, own = name.rpartition(".")
                table = self.module.get_submodule(owner)._parameters
                if tensor.requires_grad and table[own] is not tensor:
                    yield table, own, tensor

    def _facts(self, block: nn.Module) -> list[Any]:
        own = vars(block).copy()
        own.pop(self._but, None)
        held = [*map(vars, self._modules)]
        tables = [own, *held, *self._tables]
        return [
            type(block),
            *map(type, self._modules),
            *held,
            *chain.from_iterable(tables),
            *chain.from_iterable(map(dict.values, tables)),
            *chain.from_iterable(map(_SHARED_BY, self._shards)),
        ]


def _above(parts: Mapping[str, LayerPart]) -> set[str]:
    """Return the paths of the modules in which there are parts."""
    return {path[:end] for path in parts for end, letter in enumerate(path) if letter == "."}
