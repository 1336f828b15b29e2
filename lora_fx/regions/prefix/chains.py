"""Which blocks lie below everything that is trained: the leading ones of each list of blocks."""

from collections.abc import Iterator

from torch import nn

from lora_fx.adapters.attach import STATE, is_adapted
from lora_fx.text import dotted

Chain = tuple[tuple[str, nn.Module], ...]
"""Blocks (path, module) that follow each other in one list."""


def frozen_chains(model: nn.Module) -> list[Chain]:
    """Return, of every list of blocks, the leading ones in which nothing is adapted or trained.

    A list inside of a block (of experts, say) is a part of that block.  Whether what stands before a list is trained
    does not matter here: its output is an argument of the first block.
    """
    return [chain for path, holder in _lists(model, "") if (chain := tuple(_leading(path, holder)))]


def _lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost lists of blocks, in model order."""
    for name, child in module.named_children():
        here = dotted(path, name)
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and any(map(_is_block, child.children())):
            yield here, child
        else:
            yield from _lists(child, here)


def _leading(path: str, holder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in holder.named_children():
        if not _is_block(child) or why_not_frozen(child):
            return
        yield dotted(path, name), child


def _is_block(module: nn.Module) -> bool:
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    return not is_list and next(module.children(), None) is not None


def why_not_frozen(block: nn.Module) -> str:
    """Return what in a block is adapted or trained; empty if nothing is."""
    if is_adapted(block) or any(STATE in module.__dict__ for module in block.modules()):
        return "it is adapted"
    trained = next((name for name, parameter in block.named_parameters() if parameter.requires_grad), None)
    return "" if trained is None else f"{trained} is trained"
