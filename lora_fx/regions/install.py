"""Put regions on a model and take them off; identical blocks share what they learn."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lora_fx.adapters.dicts import modules_beside
from lora_fx.capture.captured import Captured
from lora_fx.models.swap import swap, take_off
from lora_fx.models.tensors import dotted
from lora_fx.models.walking import modules_of
from lora_fx.regions.blocks import BlockPrograms
from lora_fx.regions.candidates import structure_of
from lora_fx.regions.checking import PREFIX, REGION, RunsGraphs
from lora_fx.regions.region import GuardedRegion, Region
from lora_fx.regions.reuse import program_for


def install(model: nn.Module, paths: Iterable[str], passes: tuple[str, ...] = ()) -> None:
    """Let the submodules at the paths run as regions, in place.

    Blocks of the same class, structure, shapes and adapters share one BlockPrograms: each graph is captured once.

    Args:
        model: changed in place.
        paths: of the submodules, each with a forward.
        passes: names of the optimisations that programs get (`program.OPTIMISATIONS`).
    """
    blocks: dict[tuple[Any, ...], BlockPrograms] = {}
    for number, path in enumerate(paths):
        module = model.get_submodule(path)
        block = blocks.setdefault(structure_of(module), BlockPrograms(passes))
        swap(module, GuardedRegion)
        module.__dict__[REGION] = Region(path, block, number)


def mark_last(model: nn.Module) -> None:
    """Let the last of each row of blocks, if it has code for it, compute its rows where they are asked for, in place.

    A row of blocks are those whose paths differ in numbers only.
    """
    last: dict[str, tuple[nn.Module, Region]] = {}
    found = [(module, region) for _, module, region in regions(model) if any(p.labelled for p in region.block.programs)]
    for module, region in sorted(found, key=lambda pair: pair[1].number):
        alike = ".".join("*" if part.isdigit() else part for part in region.path.split("."))
        last[alike] = module, region
    kinds = {id(region.block) for _, region in last.values()}
    for module, region in last.values():
        region.deferring.last = True
        region.deferring.weights = tuple(map(id, module.parameters()))
    for _, region in found:
        region.deferring.wanted = id(region.block) in kinds


def uninstall(module: nn.Module) -> None:
    """Take the region off one module, in place."""
    take_off(module, RunsGraphs)
    module.__dict__.pop(REGION, None)
    module.__dict__.pop(PREFIX, None)


def regions(model: nn.Module) -> list[tuple[str, nn.Module, Region]]:
    """Return (path, module, region) for every region of the model."""
    named = modules_beside(model)
    return [(path, module, module.__dict__[REGION]) for path, module in named if REGION in module.__dict__]


def in_graphs(model: nn.Module) -> set[str]:
    """Return the paths of the linears that are computed inside a graph whenever one fits the call."""
    paths: set[str] = set()
    for path, _, region in regions(model):
        computed = [program.computes for program in region.block.programs if not program.static]
        inside = frozenset.intersection(*computed) if computed else frozenset()
        paths |= {dotted(path, relative) for relative in inside}
    return paths


def for_one_size(model: nn.Module) -> list[str]:
    """Return the paths of the regions that have graphs, each for one size only."""
    blocks = [(path, region.block.programs) for path, _, region in regions(model)]
    return [path for path, programs in blocks if programs and all(program.static for program in programs)]


def without_graph(model: nn.Module) -> list[tuple[str, str]]:
    """Return (path, why) of every region that has no graph, though one was captured for it."""
    return [
        (path, "; ".join(region.block.failures.values()))
        for path, _, region in regions(model)
        if not region.block.programs and region.block.failures
    ]


def called_whole(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the submodules that graphs call as they are."""
    for path, _, region in regions(model):
        for program in region.block.programs:
            targets = {str(node.target) for node in program.graph.nodes if node.op == "call_module"}
            yield from sorted(dotted(path, target) for target in targets)


Library = dict[tuple[Any, ...], list[tuple[Captured, bool]]]
"""Captured graphs, and whether they are for one size only, by the structure of the block that they come from."""


def library_of(model: nn.Module) -> Library:
    """Return every graph that the model's regions have captured, by the structure of the blocks."""
    library: Library = {}
    for _, module, region in regions(model):
        library.setdefault(
            structure_of(module), [(program.captured, program.static) for program in region.block.programs]
        )
    return library


def stock(
    model: nn.Module,
    library: Library,
    structures: dict[str, tuple[Any, ...]],
    seconds: Mapping[tuple[Any, ...], float],
) -> None:
    """Give the regions of an adapted model the graphs captured from its base.

    Args:
        model: the adapted model, with regions installed.
        library: the captured graphs of the base.
        structures: for each region's path, the structure of the block in the base.
        seconds: the time that this has taken, by structure.
    """
    stocked: set[int] = set()
    for path, module, region in regions(model):
        if id(region.block) in stocked:
            continue
        stocked.add(id(region.block))
        region.block.seconds += seconds.get(structures[path], 0.0)
        for captured, static in library.get(structures[path], []):
            with contextlib.suppress(AttributeError):  # it reads what a forward makes first: then it is captured later
                region.block.programs.append(program_for(captured, module, region.block.passes, static))


def remade(model: nn.Module, owners: Collection[int]) -> None:
    """Write the graphs of regions anew after these layers, by their id, have got their first adapter; in place.

    Blocks that have become unlike go apart.  Nothing is captured; what is written is proven when it is first called.
    """
    blocks: dict[tuple[Any, ...], BlockPrograms] = {}
    for _, module, region in regions(model):
        if not any(id(inner) in owners for inner in modules_of(module)):
            continue
        region.be_whole()  # what is split is found out anew
        key = (id(region.block), structure_of(module))
        if key not in blocks:
            old, block = region.block, BlockPrograms(region.block.passes, sizes=region.block.sizes)
            for program in old.programs:
                with contextlib.suppress(AttributeError):  # as in `stock`
                    block.programs.append(program_for(program.captured, module, old.passes, program.static))
            blocks[key] = block
        region.block = blocks[key]
        region.mine = []
