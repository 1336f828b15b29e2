"""A graph of torch.fx as statements: one line of code each, with names that do not depend on how it was made."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from lora_fx.adapters.attach import HOME, Attached, attached, share_adapter, shown_parameters
from lora_fx.adapters.spec import AdapterSpec
from lora_fx.graphdiff.costs import adapter_flops, called_flops, product_flops, weights_in
from lora_fx.graphdiff.graphs import INPUT, RETURN, Statement, Weight, escaped
from lora_fx.graphdiff.nodefacts import factor_of, function_name, place_of, stem_of, value_text
from lora_fx.models.layers import kind_of
from lora_fx.models.swap import original_class
from lora_fx.models.tensors import dotted
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import is_plain_layer
from lora_fx.passes.inject import splice_adapters, splice_layer
from lora_fx.passes.rawsites import LoRANodes, raw_uses
from lora_fx.passes.sites import lora_nodes, site_calls

_FACTORS = re.compile(r"(^|\.)lora_(A|B|dropout|magnitude_vector)(\.[^.]+)*$")


@dataclass(frozen=True, slots=True)
class Statements:
    """A graph over a module as nodes; paths and names of weights count from the module."""

    nodes: tuple[Statement, ...]
    adapted: dict[int, tuple[str, str]]
    """For nodes that show an adapter: (path of the owner of the weight, name of the weight)."""


def statements_of(graph: fx.Graph, module: nn.Module) -> Statements:
    """Return the statements of a graph over the module; what computes nothing (attributes) is inlined."""
    graph_module = fx.GraphModule(module, copy.deepcopy(graph))
    return _Writer(graph_module, module).statements()


def placed(found: Statements, module: nn.Module, path: str) -> tuple[list[Statement], dict[str, Weight]]:
    """Return the statements as those of the module at a path of a model, and the weights that they read."""
    own = weights_in(module)
    nodes: list[Statement] = []
    weights: dict[str, Weight] = {}
    for position, node in enumerate(found.nodes):
        names = tuple(dotted(path, name) for name in node.weights)
        weights |= {name: own[short] for name, short in zip(names, node.weights, strict=True)}
        rule = _rule(module, *found.adapted[position]) if position in found.adapted else ""
        nodes.append(replace(node, path=dotted(path, node.path), region=path, weights=names, rule=rule))
    return nodes, weights


def _rule(module: nn.Module, owner: str, parameter: str) -> str:
    adapter = attached(module.get_submodule(owner), parameter)
    return "" if adapter is None else describe_spec(adapter.spec)


def adapted_graph(graph: fx.Graph, module: nn.Module) -> fx.Graph:
    """Return a copy of a captured graph with the module's adapters written into it, node by node."""
    graph_module = fx.GraphModule(module, copy.deepcopy(graph))
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
        self.adapted: dict[int, tuple[str, str]] = {}
        self.position: dict[fx.Node, int] = {}
        self.inlined: dict[fx.Node, str] = {}
        self.inputs: list[int] = []
        """Of the statement that is being written."""
        self.lora = {found.result: found for found in lora_nodes(graph_module)}
        self.silent = {node for found in self.lora.values() for node in found.between if node is not found.result}
        self.calls = {call.node: call.path for call in site_calls(graph_module)}
        own = isinstance(module, fx.GraphModule)  # in a region's graph, raw weights show their adapters themselves
        self.raw = {use.node: use.parameter for use in raw_uses(graph_module)} if own else {}
        self.bases = {found.base for found in self.lora.values()}

    def statements(self) -> Statements:
        for node in self.graph_module.graph.nodes:
            if node in self.silent or (node in self.bases and node.op != "get_attr"):
                continue
            if node.op == "get_attr" and not self._is_handed_on(node):
                self.inlined[node] = self._attribute(node)
            else:
                self._write(node)
        return Statements(tuple(self.nodes), self.adapted)

    def _write(self, node: fx.Node) -> None:
        self.inputs = []
        code, name = self._statement(node), self._name(node)
        site = self._site(node)
        weights = self._weights(node)
        position = self.position[node] = len(self.nodes)
        adapter = self._read(node) if node.op == "get_attr" else self._at(site)
        if adapter is not None:
            owner, _, last = (str(node.target) if node.op == "get_attr" else self._weight_at(site)).rpartition(".")
            self.adapted[position] = owner, last
        self.nodes.append(
            Statement(
                path=_FACTORS.sub("", site),
                op=self._op(node),
                name=name,
                code=code,
                inputs=tuple(self.inputs),
                weights=weights,
                value=value_text(self.lora[node].base if node in self.lora else node),
                flops=self._flops(node, adapter, weights),
            )
        )

    # -- where a node belongs

    def _site(self, node: fx.Node) -> str:
        if node in self.lora:
            return self.lora[node].path
        if node in self.calls:
            return self.calls[node]
        if node in self.raw:
            return self.raw[node]
        if self._is_handed_on(node):
            return self._site_read(node)
        return str(node.target) if node.op == "call_module" else place_of(node)

    def _site_read(self, node: fx.Node) -> str:
        """Return the name under which the weight that a node reads is a site."""
        owner, _, last = str(node.target).rpartition(".")
        return owner if last == "weight" and kind_of(self.module.get_submodule(owner)) else str(node.target)

    def _is_handed_on(self, node: fx.Node) -> bool:
        """Whether the node reads a weight that an adapter may change for what is more than a call of its layer."""
        owner, _, last = str(node.target).rpartition(".")
        if node.op != "get_attr":
            return False
        parameter = getattr(self.module.get_submodule(owner), "_parameters", {}).get(last)
        is_matrix = parameter is not None and parameter.dim() > 1
        return is_matrix and any(user not in self.calls for user in node.users)

    # -- adapters

    def _read(self, node: fx.Node) -> Attached | None:
        """Return the adapter of the weight that the node reads, if it has one that shows in it."""
        owner, _, last = str(node.target).rpartition(".")
        module = self.module.get_submodule(owner) if node.op == "get_attr" else None
        return attached(module, last) if module is not None and last in shown_parameters(module) else None

    def _weight_at(self, path: str) -> str:
        """Return the dotted name of the weight of a site: of a raw parameter, or of a module."""
        owner, _, last = path.rpartition(".")
        return path if last in self.module.get_submodule(owner)._parameters else dotted(path, "weight")

    def _at(self, path: str) -> Attached | None:
        """Return the adapter at a site."""
        try:
            owner, _, last = self._weight_at(path).rpartition(".")
            return attached(self.module.get_submodule(owner), last)
        except AttributeError:  # an exported program keeps no modules without parameters
            return None

    # -- what it costs

    def _weights(self, node: fx.Node) -> tuple[str, ...]:
        """Return the names of the parameters that the statement reads, those of its adapter included."""
        found: list[str] = []
        source = self.lora[node].base if node in self.lora else node
        for each in (node, source, *source.all_input_nodes):
            if each.op == "get_attr" and (each is node or each in self.inlined):
                found += self._weights_read(each)
            elif each.op == "call_module" and each in (node, source):
                inner = self.module.get_submodule(str(each.target))
                found += [dotted(str(each.target), name) for name, _ in inner.named_parameters()]
        if node in self.lora and source.op != "call_module":
            found += self._factors(self._weight_at(self.lora[node].path))
        return tuple(dict.fromkeys(found))

    def _weights_read(self, node: fx.Node) -> list[str]:
        owner, _, last = str(node.target).rpartition(".")
        if last not in getattr(self.module.get_submodule(owner), "_parameters", {}):
            return []
        return [str(node.target), *(self._factors(str(node.target)) if self._read(node) is not None else ())]

    def _factors(self, weight: str) -> list[str]:
        """Return the names of the parameters of the adapter of a weight."""
        owner, _, last = weight.rpartition(".")
        found = attached(self.module.get_submodule(owner), last)
        if found is None:
            return []
        own = {id(each) for each in found.parameters()}
        home = self.module.get_submodule(owner)
        return [dotted(owner, name) for name, each in home.named_parameters() if id(each) in own]

    def _flops(self, node: fx.Node, adapter: Attached | None, weights: tuple[str, ...]) -> int:
        source = self.lora[node].base if node in self.lora else node
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

    def _statement(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return ""
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            return f"return {self._value(node.args[0])}"
        return self._lora_code(self.lora[node]) if node in self.lora else self._code(node)

    def _op(self, node: fx.Node) -> str:
        source = self.lora[node].base if node in self.lora else node
        if source.op == "call_module":
            return original_class(self.module.get_submodule(str(source.target))).__name__
        if source.op == "call_method":
            return f".{source.target}"
        fixed = {"placeholder": INPUT, "output": RETURN, "get_attr": "weight"}
        return fixed.get(source.op) or function_name(source.target)

    def _attribute(self, node: fx.Node) -> str:
        found = self._read(node)
        if found is None:
            return escaped(f"self.{node.target}")
        owner, _, last = str(node.target).rpartition(".")
        home = owner if found.home is found.owner else dotted(owner, last + HOME)
        B, A = (f"self.{dotted(home, factor)}" for factor in ("lora_B", "lora_A"))
        delta = f"{B} @ {A}" if found.spec.layout == "out_in" else f"({B} @ {A}).T"
        return escaped(f"(self.{node.target} + {delta} * {found.spec.scaling})")

    def _name(self, node: fx.Node) -> str:
        if node.op == "output":
            return ""
        if node.op == "placeholder":
            return str(node.target)
        if node.op == "get_attr":
            return "_".join([part for part in str(node.target).split(".") if not part.isdigit()][-3:])
        return stem_of(self.lora[node].base if node in self.lora else node)

    def _lora_code(self, found: LoRANodes) -> str:
        by_kind = {factor_of(node): node for node in found.between}
        if "lora_A" not in by_kind:
            return self._raw_code(found)
        base = self._code(found.base)
        scaled = by_kind["lora_B"].args[0]
        assert isinstance(scaled, fx.Node)
        x = self._lora_input(by_kind["lora_A"])
        path = escaped(found.path)
        inner = f"self.{path}.lora_B(self.{path}.lora_A({x}) * {self._value(scaled.args[1])})"
        cast = ".to(base)" if any(node.target == "type_as" for node in found.between) else ""
        if factor_of(found.result) == "lora_magnitude_vector":
            return f"self.{path}.lora_magnitude_vector({base}, {inner}{cast})"
        return f"{base} + {inner}{cast}"

    def _raw_code(self, found: LoRANodes) -> str:
        """Return the statement of a product with a raw parameter: its inner nodes are many, and say no more."""
        adapter = self._at(found.path)
        scaling = "" if adapter is None else f" * {adapter.spec.scaling}"
        return f"{self._code(found.base)} + self.{escaped(found.path)}_lora(..){scaling}"

    def _lora_input(self, lora_a: fx.Node) -> str:
        x = lora_a.args[0]
        assert isinstance(x, fx.Node)
        if factor_of(x) == "lora_dropout":
            return f"dropout({self._value(x.args[0])})"
        return self._value(x)

    def _code(self, node: fx.Node) -> str:
        arguments = [self._value(each) for each in node.args]
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
