"""Let frozen blocks answer by what is kept of them, and take that off again."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from lora_fx.models.swap import swap, take_off
from lora_fx.regions.checking import PREFIX, ModuleCall, RunsGraphs
from lora_fx.regions.install import install, uninstall
from lora_fx.regions.prefix.calls import answer
from lora_fx.regions.prefix.chains import frozen_chains
from lora_fx.regions.prefix.state import BlockState, Kept
from lora_fx.regions.region import region_of


class KeptBlock(RunsGraphs):
    """Mixin for a frozen block whose output, or that of a block behind it, is kept."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState | None = self.__dict__.get(PREFIX)
        if state is None or state.kept is None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        return answer(state, state.kept, ModuleCall(self, super().forward, args, kwargs))


def keep(model: nn.Module, kept: Kept) -> list[str]:
    """Let the frozen blocks of a model answer by what is kept, in place; return the paths that became regions for it.

    Each chain keeps the output of its last block.
    """
    leave(model, ())  # a copy of a model whose blocks were kept still has the means
    chains = frozen_chains(model)
    without = [path for chain in chains for path, block in chain if region_of(block) is None]
    install(model, without)
    for number, chain in enumerate(chains):
        for path, block in chain:
            swap(block, KeptBlock)
            block.__dict__[PREFIX] = BlockState(path, number, path == chain[-1][0], kept)
    return without


def leave(model: nn.Module, regions: Collection[str]) -> None:
    """Let all blocks of a model compute again, in place; those at these paths are no regions any more."""
    for path, block, _ in list(kept_blocks(model)):
        if path in regions:
            uninstall(block)
        else:
            take_off(block, KeptBlock)
            del block.__dict__[PREFIX]


def kept_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, BlockState]]:
    """Yield (path, block, state) of every block whose output, or that of one behind it, is kept."""
    for path, module in model.named_modules():
        state = module.__dict__.get(PREFIX)
        if state is not None:
            yield path, module, state
