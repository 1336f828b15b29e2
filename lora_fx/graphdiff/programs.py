"""Exported programs as Graphs."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from lora_fx.errors import LoraFxError
from lora_fx.graphdiff.canonical import placed, statements_of
from lora_fx.graphdiff.costs import totals
from lora_fx.graphdiff.graphs import Graph
from lora_fx.models.code import UncompiledGraph
from lora_fx.models.torch_internals import deepcopy
from lora_fx.sources.regular import is_regular


class ProgramFileError(LoraFxError):
    """A file is not an exported program that this torch can read, or was not said to be trusted."""


_WHY = """
  pickles  torch unpickles the example inputs, and weights and constants that are not plain tensors
  sizes    torch evaluates the sizes that are not fixed as Python expressions
  if you trust whoever wrote it: trust=True, or --trust on the command line"""


def load_program(path: Path, trust: bool) -> ExportedProgram:
    """Return the program of a `.pt2` file.

    Args:
        path: of the file.
        trust: that reading it may run code, as it may with torch.export.load (torch 2.13).

    Raises:
        ProgramFileError: it is not trusted; it holds none, or one that this torch cannot read.
    """
    if not is_regular(path):
        raise ProgramFileError(f"{path}: no such file")
    if not trust:
        raise ProgramFileError(f"{path}: is a program, and reading it can run any code that is in it{_WHY}")
    try:
        with warnings.catch_warnings():  # torch 2.9, of how it reads the file itself
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            return torch.export.load(path)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise ProgramFileError(f"{path}: cannot be read as a .pt2 file: {type(error).__name__}: {text}") from error


def graph_of_program(program: ExportedProgram, name: str) -> Graph:
    """Return the graph of an exported program; its weights are named as in the model that was exported."""
    root, attributes = _tree(program)
    graph = deepcopy(program.graph)
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target) in attributes:
            node.op, node.target = "get_attr", attributes[str(node.target)]
    nodes, weights = placed(statements_of(graph, root), root, "")
    parameters = {id(tensor): tensor for tensor in program.state_dict.values() if isinstance(tensor, nn.Parameter)}
    return Graph(name, tuple(nodes), weights, *totals(parameters.values()))


def _tree(program: ExportedProgram) -> tuple[fx.GraphModule, dict[str, str]]:
    """Return modules that hold the program's tensors, and which of its inputs is which of them."""
    root = UncompiledGraph(nn.Module(), fx.Graph())
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    for target in dict.fromkeys(names.values()):
        tensor = program.state_dict.get(target, program.constants.get(target))
        if tensor is not None:
            _put(root, target, tensor)
    return root, names


def _put(root: nn.Module, name: str, tensor: Any) -> None:
    owner = root
    *path, last = name.split(".")
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    elif isinstance(tensor, Tensor):
        owner.register_buffer(last, tensor, persistent=False)
