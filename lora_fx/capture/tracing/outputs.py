"""A forward's result as a graph's output: tuples, lists and dicts as they are, objects of known classes rebuilt."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.capture.calls.arguments import is_constant
from lora_fx.capture.calls.reasons import Untraceable
from lora_fx.capture.tracing.copies import reports
from lora_fx.capture.tracing.proxies import is_proxy
from lora_fx.capture.tracing.writer import GraphWriter
from lora_fx.models.torch_internals import pytree


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


@dataclasses.dataclass(frozen=True, slots=True)
class Remake:
    """Makes an object of a dataclass that torch's pytree does not know from its attributes; nothing else runs."""

    kind: type
    names: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return self.kind.__name__

    def __call__(self, *values: Any) -> Any:
        made: Any = object.__new__(self.kind)
        for name, value in zip(self.names, values, strict=True):
            object.__setattr__(made, name, value)
        return made


def write_output(writer: GraphWriter, result: Any) -> None:
    """Write the graph's output node for what the forward returned."""
    writer.graph.output(_output(writer, result))


def _output(writer: GraphWriter, value: Any) -> Any:
    if isinstance(value, torch.Size):
        return writer.emit("call_function", torch.Size, (writer.argument(tuple(value)),))
    is_symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    if isinstance(value, Tensor) or is_symbolic or is_constant(value) or is_proxy(value):
        return writer.argument(value)
    if type(value) in (tuple, list):
        return type(value)(_output(writer, item) for item in value)
    if type(value) is dict:
        return {key: _output(writer, item) for key, item in value.items()}
    if isinstance(value, tuple) and "_fields" in vars(type(value)):
        # a node: torch 2.9 writes a named tuple into a graph's return without importing its class
        return writer.emit("call_function", type(value), tuple(_output(writer, item) for item in value))
    return _registered(writer, value)


def _registered(writer: GraphWriter, value: Any) -> fx.Node:
    leaves, structure = pytree.tree_flatten(value)
    if leaves != [value]:
        return writer.emit("call_function", Rebuild(structure), [_output(writer, leaf) for leaf in leaves])
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not reports(value):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        remake = Remake(type(value), tuple(values))
        return writer.emit("call_function", remake, [_output(writer, part) for part in values.values()])
    raise Untraceable(f"the forward returns an object of type {type(value).__name__}")
