"""Names of modules, attributes and arguments where Python source is generated: written so that they stay names.

torch.fx writes names into the source that it compiles as they are: one with a quote or a newline ends the text that it
stands in, a keyword is no attribute, and Python folds letters that look alike ("ﬁ" is read as "fi").  Names come from
configurations and files of others, so nothing here is compiled before every name in it is one that stays what it is.
"""

import copy
import enum
import keyword
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from lora_fx.errors import RefusedError
from lora_fx.models.tensors import attribute_at

_ALIAS = "lora_fx_alias_"
_WITH_PATH = ("call_module", "get_attr")
"""Nodes whose target is a dotted path of the module."""


def is_plain(name: str) -> bool:
    """Whether Python reads the name as an identifier, and as this one."""
    return name.isidentifier() and not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name


def attribute(access: str, name: str) -> str:
    """Return the source that reads an attribute: `x.name`, or `getattr(x, 'any "name"')`."""
    return f"{access}.{name}" if is_plain(name) else f"getattr({access}, {name!a})"


def stays_itself(path: str) -> bool:
    """Whether torch.fx can write the dotted path of a module or tensor so that it is read as this one."""
    return all(
        is_plain(part) if part.isidentifier() else part.isprintable() and '"' not in part and "\\" not in part
        for part in path.split(".")
    )


def refuse_odd_paths(paths: Iterable[str]) -> None:
    """Refuse dotted paths of modules and tensors that torch.fx cannot write.

    Raises:
        RefusedError: with all of them.
    """
    _refuse(path for path in paths if not stays_itself(path))


def module_of(program: ExportedProgram) -> nn.Module:
    """Return the module of an exported program, in whose source torch writes the names of all its tensors.

    Raises:
        RefusedError: one of them would not stay a name there.
    """
    signature = program.graph_signature
    inputs = (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants)
    named = (name for table in inputs for pair in table.items() for name in pair)
    refuse_odd_paths((*program.state_dict, *program.constants, *named))
    return program.module()


def refuse_odd_names(graph: fx.Graph, paths: bool = True) -> None:
    """Refuse a graph of which torch.fx would make source that says something else than the graph.

    Args:
        graph: before it is compiled.
        paths: False if the paths of modules and tensors will be aliases, as `compiled` makes them.

    Raises:
        RefusedError: with all names of modules, tensors, methods and arguments that cannot be written.
    """
    _refuse(name for node in graph.nodes for name in _odd_names(node, paths))


def _refuse(names: Iterable[str]) -> None:
    odd = [(ascii(name), "is not read back as it is") for name in dict.fromkeys(names)]
    if odd:
        raise RefusedError(
            "torch.fx would write names into Python source that do not stay names there; nothing was compiled",
            odd,
            "rename these modules, parameters or arguments",
        )


def _odd_names(node: fx.Node, paths: bool) -> Iterator[str]:
    target = str(node.target)
    if paths and node.op in _WITH_PATH and not stays_itself(target):
        yield target
    if node.op in ("placeholder", "call_method") and not is_plain(target.lstrip("*")):
        yield target
    if node.target is getattr and isinstance(node.args[1], str) and not is_plain(node.args[1]):
        yield node.args[1]  # written as an attribute wherever it looks like an identifier
    yield from (name for name in node.kwargs if not is_plain(name))
    members: list[str] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda value: _note_member(value, members))
    yield from members


def _note_member(value: Any, names: list[str]) -> Any:
    if isinstance(value, enum.Enum) and not is_plain(str(value.name)):
        names.append(str(value.name))
    return value


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """Return what `copy.deepcopy(graph)` does, in a third of its calls: arguments are not searched for symbols."""
    made: dict[fx.Node, fx.Node] = {}
    duplicate = fx.Graph(tracer_cls=graph._tracer_cls)
    duplicate.set_codegen(copy.deepcopy(graph._codegen))
    for node in graph.nodes:
        args, kwargs = (fx.node.map_arg(given, made.__getitem__) for given in (node.args, node.kwargs))
        new = made[node] = duplicate.create_node(node.op, node.target, (), {}, node.name, node.type)
        if args:
            new.args = args
        if kwargs:
            new.kwargs = kwargs
        new.meta.update(node.meta)
    return duplicate


class UncompiledGraph(fx.GraphModule):
    """A graph with what it refers to, for passes; it is never run, so no source is made of it."""

    def recompile(self) -> Any:
        """Make no source, whatever changes."""


def compiled(graph: fx.Graph, title: str) -> Callable[..., Any]:
    """Return the function of a graph, called with the module and the graph's inputs; tracebacks show the title.

    Paths that torch.fx could not write are aliases in its source, and looked up on the module at each call.

    Raises:
        RefusedError: the name of a method or argument cannot be written.
    """
    aliases: dict[str, str] = {}
    if not all(stays_itself(str(node.target)) for node in graph.nodes if node.op in _WITH_PATH):
        graph = copy.deepcopy(graph)
        for node in graph.nodes:
            if node.op in _WITH_PATH:
                alias = f"{_ALIAS}{len(aliases)}"
                aliases[alias], node.target = str(node.target), alias
    refuse_odd_names(graph)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, title, "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    if not aliases:
        return function
    return lambda module, *inputs: function(_Aliased(module, aliases), *inputs)


class _Aliased:
    """What stands for the module in source with aliases."""

    def __init__(self, module: Any, aliases: dict[str, str]) -> None:
        self._module, self._aliases = module, aliases

    def __getattr__(self, alias: str) -> Any:
        return attribute_at(self._module, self._aliases[alias])
