"""A graph as data: statements with paths, inputs, weights and sizes.  Needs no torch; saved as JSON and read back."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_fx.errors import LoraFxError

SCHEMA_VERSION = 1
INPUT, RETURN = "input", "return"
_REFERENCE = re.compile(r"\$(\$|\d+)")
_BITS = re.compile(r"\d+")


class GraphFileError(LoraFxError):
    """A file does not hold a graph that `Graph.save` has written."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = _BITS.findall(self.dtype)
        return self.parameters * (int(bits[0]) if bits else 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a graph."""

    path: str
    """Of the site or submodule that it belongs to, from the model's root."""
    op: str
    """Name of the function, method or class that is called; `input` and `return` for what comes in and goes out."""
    name: str
    """What its result is called, before names are numbered; empty if it has none."""
    code: str
    """The right-hand side, with $0, $1, … for the inputs, and $$ for a dollar."""
    inputs: tuple[int, ...] = ()
    """Positions in the graph's nodes."""
    region: str = ""
    """The submodule that is `self` in the code."""
    weights: tuple[str, ...] = ()
    """Names of the parameters that it reads."""
    value: str = ""
    """Dtype and sizes of the result, where they are known."""
    rule: str = ""
    """For an adapted site: rule, rank and scaling."""
    flops: int = 0
    """Floating-point operations with weights, for each row of input (a token, an image's position)."""

    def written(self, names: Sequence[str]) -> str:
        """Return the code with names for its inputs."""
        return _REFERENCE.sub(lambda match: "$" if match[1] == "$" else names[int(match[1])], self.code)


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's graph, as far as it is known: blocks statement by statement, the rest module by module."""

    name: str
    nodes: tuple[Statement, ...]
    weights: Mapping[str, Weight] = field(default_factory=dict)
    """Those that the nodes read."""
    parameters: int = 0
    """Number of parameters of the whole model."""
    bytes: int = 0
    """What they take."""

    @property
    def flops(self) -> int:
        return sum(node.flops for node in self.nodes)

    @property
    def statements(self) -> int:
        return sum(node.op != INPUT for node in self.nodes)

    def to_json(self) -> str:
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "kind": "lora_fx graph", "name": self.name}
        document |= {"parameters": self.parameters, "bytes": self.bytes}
        document["weights"] = {name: [list(each.shape), each.dtype] for name, each in self.weights.items()}
        lines = (json.dumps(statement_data(node), ensure_ascii=False) for node in self.nodes)
        head = json.dumps(document, ensure_ascii=False)
        return f'{head[:-1]}, "nodes": [\n' + ",\n".join(lines) + "\n]}"

    @staticmethod
    def from_json(text: str) -> Graph:
        """Return the graph that `to_json` has written.

        Raises:
            GraphFileError: it is no such JSON.
        """
        try:
            document = json.loads(text)
            if document["kind"] != "lora_fx graph" or document["schema_version"] != SCHEMA_VERSION:
                raise GraphFileError(f"not a graph of schema version {SCHEMA_VERSION}")
            nodes = tuple(map(statement_from_data, document["nodes"]))
            weights = {name: Weight(tuple(shape), dtype) for name, (shape, dtype) in document["weights"].items()}
            graph = Graph(document["name"], nodes, weights, document["parameters"], document["bytes"])
        except (ValueError, KeyError, TypeError) as error:
            raise GraphFileError(f"not a graph that lora_fx has saved: {type(error).__name__}: {error}") from error
        _check(graph)
        return graph

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Graph:
        """Return the graph of a file; GraphFileError if it holds none.  Imports no torch."""
        try:
            return Graph.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise GraphFileError(f"{os.fspath(path)}: cannot be read: {error}") from error
        except GraphFileError as error:
            raise GraphFileError(f"{os.fspath(path)}: {error}") from error


_DEFAULTS = {each.name: each.default for each in fields(Statement)[4:]}
_LISTS = ("inputs", "weights")


def statement_data(node: Statement) -> dict[str, Any]:
    """Return a node as JSON holds it: what is empty is left out."""
    data: dict[str, Any] = {"path": node.path, "op": node.op, "name": node.name, "code": node.code}
    optional: dict[str, Any] = {
        "inputs": node.inputs, "region": node.region, "weights": node.weights, "value": node.value,
        "rule": node.rule, "flops": node.flops,
    }  # fmt: skip
    return data | {key: value for key, value in optional.items() if value != _DEFAULTS[key]}


def statement_from_data(data: Mapping[str, Any]) -> Statement:
    """Return the node that `statement_data` has written."""
    facts: dict[str, Any] = {key: tuple(value) if key in _LISTS else value for key, value in data.items()}
    return Statement(**facts)


def _check(graph: Graph) -> None:
    for position, node in enumerate(graph.nodes):
        if not all(type(each) is int and 0 <= each < position for each in node.inputs):
            raise GraphFileError(f"node {position} ({node.path or node.op}) has an input that is no earlier node")
        referred = {int(each) for each in _REFERENCE.findall(node.code) if each != "$"}
        if referred and max(referred) >= len(node.inputs):
            raise GraphFileError(f"node {position} ({node.path or node.op}) refers to an input that it has not")
        missing = [name for name in node.weights if name not in graph.weights]
        if missing:
            raise GraphFileError(f"node {position} ({node.path or node.op}) reads {missing[0]}, which is not described")


def escaped(code: str) -> str:
    """Return text as it stands in a node's code."""
    return code.replace("$", "$$")


def users_of(graph: Graph) -> list[list[tuple[int, int]]]:
    """Return, for each node, who takes it as which input: (position, number of the input)."""
    found: list[list[tuple[int, int]]] = [[] for _ in graph.nodes]
    for position, node in enumerate(graph.nodes):
        for slot, each in enumerate(node.inputs):
            found[each].append((position, slot))
    return found


def numbered(graph: Graph) -> Iterator[tuple[int, Statement]]:
    """Yield (position, node) of what computes or returns something."""
    return ((position, node) for position, node in enumerate(graph.nodes) if node.op != INPUT)
