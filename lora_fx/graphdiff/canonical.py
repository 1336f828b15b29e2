"""A graph of torch.fx as statements: one line of code each, with names that do not depend on how it was made."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from lora_fx.adapters.attach import HOME, Attached, attached, share_adapter, shown_parameters
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.graphdiff.costs import adapter_flops, called_flops, parameter_at, product_flops, weights_in
from lora_fx.graphdiff.graphs import INPUT, RETURN, Statement, Weight, escaped
from lora_fx.graphdiff.nodefacts import factor_of, function_name, place_of, stem_of, value_text
from lora_fx.models.code import UncompiledGraph
from lora_fx.models.layers import kind_of
from lora_fx.models.swap import original_class
from lora_fx.models.tensors import dotted
from lora_fx.models.torch_internals import deepcopy
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import is_plain_layer
from lora_fx.passes.inject import splice_adapters, splice_layer
from lora_fx.passes.rawsites import LENGTHS, LoRANodes, raw_uses
from lora_fx.passes.sites import lora_nodes, site_calls

_FACTORS = re.compile(r"(^|\.)lora_(A|B|dropout|magnitude_vector)(\.[^.]+)*$")


@dataclass(frozen=True, slots=True)
class Statements:
    """A graph over a module as nodes; paths and names of weights count from the module."""

    nodes: tuple[Statement, ...]
    adapted: dict[int, str]
    """For nodes that show an adapter: the name of the adapted weight."""


def statements_of(graph: fx.Graph, module: nn.Module) -> Statements:
    """Return the statements of a graph over the module; what computes nothing (attributes) is inlined.

    Both stay unchanged.  Where the graph calls `linear1`, adds its `lora_B(lora_A(x) * 2.0)` and applies F.relu, the
    statements are `linear1 = self.linear1($0) + self.linear1.lora_B(self.linear1.lora_A($0) * 2.0)` and
    `relu = F.relu($0)`.
    """
    return _Writer(UncompiledGraph(module, deepcopy(graph)), module).statements()


def placed(written: Statements, module: nn.Module, path: str) -> tuple[list[Statement], dict[str, Weight]]:
    """Return the statements as those of the module at a path of a model, and the weights that they read.

    Args:
        written: of a module that is structured as this one; its adapters may be others.
        module: whose weights and adapters the statements get.
        path: of the module.
    """
    own = weights_in(module)
    nodes: list[Statement] = []
    weights: dict[str, Weight] = {}
    for position, node in enumerate(written.nodes):
        names = tuple(dotted(path, name) for name in node.weights)
        weights |= {name: own[short] for name, short in zip(names, node.weights, strict=True)}
        adapter = _adapter_of(module, written.adapted[position]) if position in written.adapted else None
        rule = "" if adapter is None else describe_spec(adapter.spec)
        nodes.append(replace(node, path=dotted(path, node.path), region=path, weights=names, rule=rule))
    return nodes, weights


def _adapter_of(module: nn.Module, weight: str) -> Attached | None:
    """Return the adapter of a weight in a module."""
    owner, _, last = weight.rpartition(".")
    return attached(module.get_submodule(owner), last)


def adapted_graph(graph: fx.Graph, module: nn.Module) -> fx.Graph:
    """Return a copy of a captured graph with the module's adapters written into it, node by node."""
    graph_module = UncompiledGraph(module, copy.deepcopy(graph))
    editor = Editor(graph_module)
    splice_adapters(editor, to_show=True)
    if is_plain_layer(module):
        share_adapter(module, graph_module)
        splice_layer(editor)
    graph_module.graph.lint()
    return graph_module.graph


class _Writer:
    """Writes the statements of a graph."""

    def __init__(self, graph_module: fx.GraphModule, module: nn.Module) -> None:
        self.graph_module = graph_module
        self.module = module
        """What the graph runs on; its classes are lost in a GraphModule."""
        self.nodes: list[Statement] = []
        self.adapted: dict[int, str] = {}
        self.position: dict[fx.Node, int] = {}
        self.inlined: dict[fx.Node, str] = {}
        self.inputs: list[int] = []
        """Of the statement that is being written."""
        self.lora = {lora.result: lora for lora in lora_nodes(graph_module)}
        self.silent = {node for lora in self.lora.values() for node in lora.between if node is not lora.result}
        self.calls = {node: path for path, node in site_calls(graph_module)}
        own = isinstance(module, fx.GraphModule)  # in a region's graph, raw weights show their adapters themselves
        self.raw = {use.node: use.parameter for use in raw_uses(graph_module)} if own else {}
        self.silent |= {lora.base for lora in self.lora.values() if lora.base.op != "get_attr"}

    def statements(self) -> Statements:
        for node in self.graph_module.graph.nodes:
            if node in self.silent:
                continue
            if node.op == "get_attr" and not self._is_handed_on(node):
                self.inlined[node] = self._attribute(node)
            else:
                self._write(node)
        return Statements(tuple(self.nodes), self.adapted)

    def _write(self, node: fx.Node) -> None:
        self.inputs = []
        code, site, weights = self._code(node), self._site(node), self._weights(node)
        position = self.position[node] = len(self.nodes)
        adapter = self._read(node) if node.op == "get_attr" else self._at(site)
        if adapter is not None:
            self.adapted[position] = str(node.target) if node.op == "get_attr" else self._weight_at(site)
        source = self._source(node)
        self.nodes.append(
            Statement(
                path=_FACTORS.sub("", site),
                op=self._op(source),
                name=self._name(node),
                code=code,
                inputs=tuple(self.inputs),
                weights=weights,
                value=value_text(source),
                flops=self._flops(node, adapter, weights),
            )
        )

    def _source(self, node: fx.Node) -> fx.Node:
        """Return the product to which LoRA nodes add, for the node of their sum; else the node itself."""
        return self.lora[node].base if node in self.lora else node

    # -- where a node belongs

    def _site(self, node: fx.Node) -> str:
        if node in self.lora:
            return self.lora[node].path
        if node in self.calls or node in self.raw:
            return self.calls[node] if node in self.calls else self.raw[node]
        if self._is_handed_on(node):
            return self._site_read(node)
        return str(node.target) if node.op == "call_module" else place_of(node)

    def _site_read(self, node: fx.Node) -> str:
        """Return the name under which the weight that a node reads is a site."""
        owner, _, last = str(node.target).rpartition(".")
        return owner if last == "weight" and kind_of(self.module.get_submodule(owner)) else str(node.target)

    def _is_handed_on(self, node: fx.Node) -> bool:
        """Whether the node reads a weight that an adapter may change for what is more than a call of its layer."""
        parameter = parameter_at(self.module, str(node.target)) if node.op == "get_attr" else None
        return parameter is not None and parameter.dim() > 1 and any(user not in self.calls for user in node.users)

    # -- adapters

    def _read(self, node: fx.Node) -> Attached | None:
        """Return the adapter of the weight that the node reads, if it has one that shows in it."""
        owner, _, last = str(node.target).rpartition(".")
        shown = shown_parameters(self.module.get_submodule(owner)) if node.op == "get_attr" else ()
        return _adapter_of(self.module, str(node.target)) if last in shown else None

    def _weight_at(self, path: str) -> str:
        """Return the dotted name of the weight of a site: of a raw parameter, or of a module."""
        return path if parameter_at(self.module, path) is not None else dotted(path, "weight")

    def _at(self, path: str) -> Attached | None:
        """Return the adapter at a site."""
        try:
            return _adapter_of(self.module, self._weight_at(path))
        except AttributeError:  # an exported program keeps no modules without parameters
            return None

    # -- what it costs

    def _weights(self, node: fx.Node) -> tuple[str, ...]:
        """Return the names of the parameters that the statement reads, those of its adapter included."""
        names: list[str] = []
        source = self._source(node)
        for read in (node, source, *source.all_input_nodes):
            if read.op == "get_attr" and (read is node or read in self.inlined):
                names += self._weights_read(read)
            elif read.op == "call_module" and read in (node, source):
                inner = self.module.get_submodule(str(read.target))
                names += [dotted(str(read.target), name) for name, _ in inner.named_parameters()]
        if node in self.lora and source.op != "call_module":
            names += self._factors(self._weight_at(self.lora[node].path))
        return tuple(dict.fromkeys(names))

    def _weights_read(self, node: fx.Node) -> list[str]:
        name = str(node.target)
        if parameter_at(self.module, name) is None:
            return []
        return [name, *(self._factors(name) if self._read(node) is not None else ())]

    def _factors(self, weight: str) -> list[str]:
        """Return the names of the parameters of the adapter of a weight."""
        adapter = _adapter_of(self.module, weight)
        own = set() if adapter is None else {id(parameter) for parameter in adapter.parameters()}
        owner = weight.rpartition(".")[0]
        named = self.module.get_submodule(owner).named_parameters()
        return [dotted(owner, name) for name, parameter in named if id(parameter) in own]

    def _flops(self, node: fx.Node, adapter: Attached | None, weights: tuple[str, ...]) -> int:
        source = self._source(node)
        spec = None if adapter is None else adapter.spec
        if source.op == "call_module":
            return called_flops(self.module.get_submodule(str(source.target)), spec)
        if source.op == "get_attr":  # each product with it becomes two
            return adapter_flops(spec)
        if source.op not in ("call_function", "call_method"):
            return 0
        shown = node in self.lora or any("lora_" in name for name in weights)
        return product_flops(source, self.module, spec if shown else None)

    # -- text

    def _op(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return original_class(self.module.get_submodule(str(node.target))).__name__
        if node.op == "call_method":
            return f".{node.target}"
        fixed = {"placeholder": INPUT, "output": RETURN, "get_attr": "weight"}
        return fixed.get(node.op) or function_name(node.target)

    def _name(self, node: fx.Node) -> str:
        if node.op in ("output", "placeholder"):
            return "" if node.op == "output" else str(node.target)
        if node.op == "get_attr":
            return "_".join([part for part in str(node.target).split(".") if not part.isdigit()][-3:])
        return stem_of(self._source(node))

    def _code(self, node: fx.Node) -> str:
        if node in self.lora:
            return self._lora_code(self.lora[node])
        if node.op == "placeholder":
            return ""
        if node.op == "get_attr":
            return self._attribute(node)
        return f"return {self._value(node.args[0])}" if node.op == "output" else self._call(node)

    def _attribute(self, node: fx.Node) -> str:
        adapter = self._read(node)
        if adapter is None:
            return escaped(f"self.{node.target}")
        owner, _, last = str(node.target).rpartition(".")
        home = owner if adapter.home is adapter.owner else dotted(owner, last + HOME)
        B, A = (f"self.{dotted(home, factor)}" for factor in ("lora_B", "lora_A"))
        if adapter.magnitude is not None:
            return escaped(f"self.{dotted(home, LENGTHS)}(self.{node.target}, {A}, {B})")
        delta = f"{B} @ {A}" if adapter.spec.site.layout == "out_in" else f"({B} @ {A}).T"
        return escaped(f"(self.{node.target} + {delta} * {adapter.spec.scaling})")

    def _lora_code(self, lora: LoRANodes) -> str:
        """Return the statement of a product and its adapter; of a raw parameter's adapter only that it is there."""
        by_kind = {factor_of(node): node for node in lora.between if node.args}
        path = escaped(lora.path)
        base = escaped(f"self.{lora.base.target}") if lora.base.op == "get_attr" else self._call(lora.base)
        if "lora_A" not in by_kind:
            adapter = self._at(lora.path)
            return f"{base} + self.{path}_lora(..)" + ("" if adapter is None else f" * {adapter.spec.scaling}")
        scaled = by_kind["lora_B"].args[0]
        assert isinstance(scaled, fx.Node)
        x = self._lora_input(by_kind["lora_A"])
        inner = f"self.{path}.lora_B(self.{path}.lora_A({x}) * {self._value(scaled.args[1])})"
        cast = ".to(base)" if any(node.target == "type_as" for node in lora.between) else ""
        if factor_of(lora.result) == LENGTHS:
            return f"self.{path}.lora_magnitude_vector({base}, {inner}{cast})"
        return f"{base} + {inner}{cast}"

    def _lora_input(self, lora_a: fx.Node) -> str:
        x = lora_a.args[0]
        assert isinstance(x, fx.Node)
        return f"dropout({self._value(x.args[0])})" if factor_of(x) == "lora_dropout" else self._value(x)

    def _call(self, node: fx.Node) -> str:
        arguments = [self._value(argument) for argument in node.args]
        arguments += [f"{key}={self._value(value)}" for key, value in node.kwargs.items()]
        if node.op == "call_module":
            return f"self.{escaped(str(node.target))}({', '.join(arguments)})"
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        return f"{function_name(node.target)}({', '.join(arguments)})"

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._reference(value)
        if isinstance(value, tuple):
            return f"({', '.join(map(self._value, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{escaped(repr(key))}: {self._value(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._value(value.start)}, {self._value(value.stop)}, {self._value(value.step)})"
        return escaped(repr(value))

    def _reference(self, node: fx.Node) -> str:
        if node in self.inlined:
            return self.inlined[node]
        position = self.position[node]
        if position not in self.inputs:
            self.inputs.append(position)
        return f"${self.inputs.index(position)}"


def describe_spec(spec: AdapterSpec) -> str:
    """Return `rule attention · r=8 scaling=2`."""
    name = spec.rule if spec.rule.startswith("rule ") else f"rule {spec.rule}"
    return f"{f'{name} · ' if spec.rule else ''}r={spec.lora.r} scaling={spec.scaling:g}"
