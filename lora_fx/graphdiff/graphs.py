"""A graph as data: statements with paths, inputs, weights and sizes.  Needs no torch; saved as JSON and read back."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_fx.errors import LONGEST_NAME, LoraFxError
from lora_fx.sources.document import MOST_JSON_BYTES, parse_json
from lora_fx.sources.regular import UnreadableError, read_bytes
from lora_fx.sources.structure import MOST, structured
from lora_fx.text import json_text, shortened

SCHEMA_VERSION = 1
INPUT, RETURN = "input", "return"
_REFERENCE = re.compile(r"\$(\$|[0-9]+)")
_DTYPE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,40}")
MOST_INPUTS = 100_000
"""And 20 for each node: a comparison holds some 400 bytes for an input, and no model has more."""
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
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What the elements take: as many bits as the dtype's name says, 8 where it says nothing (bool)."""
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
        """Return the code with names for its inputs, by position in the node's `inputs`."""
        return _REFERENCE.sub(lambda match: "$" if match[1] == "$" else names[int(match[1])], self.code)


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's graph, as far as it is known: blocks statement by statement, the rest module by module."""

    name: str
    nodes: tuple[Statement, ...] = field(repr=False)
    weights: Mapping[str, Weight] = field(default_factory=dict, repr=False)
    """Those that the nodes read."""
    parameters: int = 0
    """Number of parameters of the whole model."""
    bytes: int = 0
    """What they take."""

    @property
    def flops(self) -> int:
        """Floating-point operations with weights, for each row of input."""
        return sum(node.flops for node in self.nodes)

    @property
    def statements(self) -> int:
        """Number of nodes that compute or return something."""
        return sum(node.op != INPUT for node in self.nodes)

    def to_json(self) -> str:
        """Return the graph as JSON, a node on each line."""
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "kind": "lora_fx graph", "name": self.name}
        document |= {"parameters": self.parameters, "bytes": self.bytes}
        document["weights"] = weights_data(self.weights)
        lines = (json_text(statement_data(node)) for node in self.nodes)
        head = json_text(document)
        return f'{head[:-1]}, "nodes": [\n' + ",\n".join(lines) + "\n]}"

    @staticmethod
    def from_json(text: str) -> "Graph":
        """Return the graph that `to_json` has written.

        Raises:
            GraphFileError: it is not such JSON.
        """
        try:
            return _graph(parse_json(text))
        except UnreadableError as error:
            raise GraphFileError(f"not a graph that lora_fx has saved: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to a file as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Graph":
        """Return the graph of a file; GraphFileError if it holds none.  Imports no torch."""
        name = shortened(os.fsdecode(path), LONGEST_NAME)
        try:
            return Graph.from_json(read_bytes(path, MOST_JSON_BYTES).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise GraphFileError(f"{name}: is no UTF-8 text") from error
        except (UnreadableError, GraphFileError) as error:
            raise GraphFileError(f"{name}: {error}") from error


def _graph(document: Any) -> Graph:
    """Return the graph of a document, held to its types.

    Raises:
        UnreadableError: it is none, or its parts do not fit together.
    """
    if not isinstance(document, dict) or document.pop("kind", None) != "lora_fx graph":
        raise UnreadableError("it has no kind that says so")
    if (version := document.pop("schema_version", None)) != SCHEMA_VERSION or type(version) is not int:
        raise UnreadableError(f"it is not of schema version {SCHEMA_VERSION}")
    if isinstance(weights := document.get("weights"), dict):
        document["weights"] = {name: _weight_row(value) for name, value in weights.items()}
    graph = structured(Graph, document, "graph")
    _check(graph)
    return graph


def _weight_row(value: object) -> object:
    return dict(zip(("shape", "dtype"), value, strict=True)) if isinstance(value, list) and len(value) == 2 else value


_FIELDS = fields(Statement)


def statement_data(node: Statement) -> dict[str, Any]:
    """Return a statement as JSON holds it: what is empty is left out."""
    facts = ((fact.name, getattr(node, fact.name), fact.default) for fact in _FIELDS)
    return {name: value for name, value, default in facts if value != default}


def weights_data(weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Return weights as JSON holds them."""
    return {name: [list(weight.shape), weight.dtype] for name, weight in weights.items()}


def _check(graph: Graph) -> None:
    for name, weight in graph.weights.items():
        if math.prod(weight.shape) >= MOST or not _DTYPE.fullmatch(weight.dtype):
            raise UnreadableError(f"the weight {shortened(name)!r} has no shape or no dtype of a tensor")
    edges, most = sum(len(node.inputs) for node in graph.nodes), MOST_INPUTS + 20 * len(graph.nodes)
    if edges > most:
        raise UnreadableError(f"the nodes have {edges:,} inputs together; at most {most:,} are read of so many nodes")
    for position, node in enumerate(graph.nodes):
        where = f"node {position} ({shortened(node.path or node.op)})"
        if not all(source < position for source in node.inputs):
            raise UnreadableError(f"{where} has an input that is not an earlier node")
        referred = (int(number[:10]) for number in _REFERENCE.findall(node.code) if number != "$")
        if max(referred, default=-1) >= len(node.inputs):
            raise UnreadableError(f"{where} refers to an input that it has not")
        missing = [name for name in node.weights if name not in graph.weights]
        if missing:
            raise UnreadableError(f"{where} reads {shortened(missing[0])}, which is not described")


def escaped(code: str) -> str:
    """Return text as it stands in a node's code: with $$ for a dollar."""
    return code.replace("$", "$$")
