"""What a graph tells of the block whose output is to be kept: whether it is a function of its inputs and weights."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.capture.tracing.inputs import ObjectInput
from lora_fx.capture.tracing.writer import writes
from lora_fx.models.layers import is_layer
from lora_fx.models.swap import original_class
from lora_fx.regions.prefix.digests import digest
from lora_fx.regions.program import Program

_OF_DATA = re.compile(r"u\d+")
"""Name of a size that depends on values."""
_BY_GROUPS = ("grouped_mm", "_grouped_mm")


@dataclass(slots=True)
class BlockCode:
    """What is known of one program."""

    program: Program
    """Kept here, so that no other one gets its identity."""
    digest: bytes
    refused: str
    """Why its output is no function of inputs and weights; empty if it is."""
    read: tuple[bool, ...]
    """Which of its inputs it uses."""
    sizes_of_data: bool
    """Whether a size in it depends on values, and so the kernels of one row on the other rows."""
    layers: tuple[str, ...]
    """Paths of the layers that it calls."""
    draws: set[str] = field(default_factory=set)
    """The modes in which it has drawn random numbers."""
    apart: dict[tuple[Any, ...], "Independence"] = field(default_factory=dict)
    """What has been found out of its rows, by the shapes of its inputs."""
    forms: dict[tuple[Any, ...], "BlockForm"] = field(default_factory=dict)
    """What it returns, by the shapes of its inputs."""


@dataclass(frozen=True, slots=True)
class BlockForm:
    """What a block returns: one tensor, perhaps the first of a tuple whose others are None."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    length: int | None
    """Of the tuple; None: the tensor itself."""

    def of(self, value: Tensor) -> Any:
        return value if self.length is None else (value, *(None,) * (self.length - 1))


@dataclass(frozen=True, slots=True)
class Independence:
    """Whether the rows of a batch are what they are whatever the others are, bit by bit.

    `apart` if they are in a batch of this size; `alone` if also in one of another size.
    """

    apart: bool
    alone: bool


def code_of(program: Program, block: nn.Module) -> BlockCode:
    """Return what the graph of a program on a block tells."""
    nodes = list(program.captured.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    constants = [(leaf.name, repr(leaf.value)) for leaf in program.captured.constants]
    text = f"{program.captured.graph}\n{constants}"
    sizes = [str(size) for node in nodes for size in node.meta.get("tensor", ((),))[0]]
    groups = any(getattr(node.target, "__name__", node.target) in _BY_GROUPS for node in nodes)
    of_data = groups or any(_OF_DATA.fullmatch(size) for size in sizes)
    read = tuple(bool(node.users) for node in placeholders)
    layers = tuple(dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module"))
    return BlockCode(program, digest(text), _refusal(program, nodes, layers, block), read, of_data, layers)


def modes_of(block: nn.Module, code: BlockCode) -> str:
    """Return what of a block's modules its graph relies on without having read it: modes, and settings of layers."""
    layers = [block.get_submodule(path) for path in code.layers]
    kinds = [f"{original_class(layer)} {layer.extra_repr()}" for layer in layers]
    return repr(([module.training for module in block.modules()], list(zip(code.layers, kinds, strict=True))))


def _refusal(program: Program, nodes: list[fx.Node], layers: Iterable[str], block: nn.Module) -> str:
    if any(map(writes, nodes)) or any(isinstance(given, ObjectInput) for given in program.captured.inputs):
        return "it writes in place"
    if program.may_give_up:
        return "a part of it cannot be followed"
    for path in layers:
        layer = block.get_submodule(path)
        if not (is_layer(layer) or original_class(layer).__module__.startswith("torch.nn.")):
            return f"it calls {path} as a whole"
    return ""
