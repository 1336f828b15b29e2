"""A forward's result as a graph's output: tuples, lists and dicts as they are, registered classes rebuilt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.capture.arguments import is_constant
from lora_fx.capture.ghosts import is_ghost
from lora_fx.capture.reasons import Untraceable
from lora_fx.capture.torch_internals import pytree
from lora_fx.capture.writer import GraphWriter


class Rebuild:
    """Makes an object of a class that torch's pytree knows (a ModelOutput) from its leaves."""

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self.__name__ = "rebuild"

    def __call__(self, *leaves: Any) -> Any:
        return pytree.tree_unflatten(list(leaves), self.structure)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rebuild) and self.structure == other.structure

    __hash__ = object.__hash__


def write_output(writer: GraphWriter, result: Any) -> None:
    """Write the graph's output node for what the forward returned."""
    writer.graph.output(_output(writer, result))


def _output(writer: GraphWriter, value: Any) -> Any:
    if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat)) or is_constant(value):
        return writer.argument(value)
    if is_ghost(value):
        return writer.argument(value)
    if type(value) in (tuple, list):
        return type(value)(_output(writer, item) for item in value)
    if type(value) is dict:
        return {key: _output(writer, item) for key, item in value.items()}
    if isinstance(value, tuple) and value._fields:  # type: ignore[attr-defined]
        return type(value)(*(_output(writer, item) for item in value))
    return _registered(writer, value)


def _registered(writer: GraphWriter, value: Any) -> fx.Node:
    leaves, structure = pytree.tree_flatten(value)
    if leaves == [value]:
        raise Untraceable(f"the forward returns an object of type {type(value).__name__}")
    return writer.emit("call_function", Rebuild(structure), [_output(writer, leaf) for leaf in leaves])
