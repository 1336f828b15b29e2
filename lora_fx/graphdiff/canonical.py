"""A graph as statements: one line of code each, with names that do not depend on how the graph was made."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.adapters.attach import HOME, Attached, attached, share_adapter, shown_parameters
from lora_fx.adapters.spec import AdapterSpec
from lora_fx.editor import Editor
from lora_fx.layerkinds import kind_of
from lora_fx.passes.flatten import is_plain_layer
from lora_fx.passes.inject import splice_adapters, splice_layer
from lora_fx.passes.rawgraph import LoRANodes, raw_uses
from lora_fx.passes.sitegraph import lora_nodes, site_calls
from lora_fx.tensors import dotted


@dataclass(frozen=True, slots=True)
class Statement:
    """One line of a graph's code."""

    text: str
    site: str
    """Path of the site or submodule that it belongs to, within the graph."""
    adapter: str = ""
    """For an adapted site: rule, rank and scaling."""


def statements_of(graph: fx.Graph, module: nn.Module) -> list[Statement]:
    """Return the statements of a graph over the module; what computes nothing (attributes, inputs) is inlined."""
    graph_module = fx.GraphModule(module, copy.deepcopy(graph))
    return _Namer(graph_module, module).statements()


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


class _Namer:
    """Names the nodes of a graph and writes their statements."""

    def __init__(self, graph_module: fx.GraphModule, module: nn.Module) -> None:
        self.graph_module = graph_module
        self.module = module
        """What the graph runs on; its classes are lost in a GraphModule."""
        self.names: dict[fx.Node, str] = {}
        self.taken: Counter[str] = Counter()
        self.lora = {found.result: found for found in lora_nodes(graph_module)}
        self.silent = {node for found in self.lora.values() for node in found.between if node is not found.result}
        self.calls = {call.node: call.path for call in site_calls(graph_module)}
        own = isinstance(module, fx.GraphModule)  # in a region's graph, raw weights show their adapters themselves
        self.raw = {use.node: use.parameter for use in raw_uses(graph_module)} if own else {}
        self.bases = {found.base for found in self.lora.values()}

    def statements(self) -> list[Statement]:
        found = []
        for node in self.graph_module.graph.nodes:
            if node in self.silent or (node in self.bases and node.op != "get_attr"):
                continue
            text = self._statement(node)
            if text is not None:
                found.append(Statement(text, self._site(node), self._adapter(node)))
        return found

    def _site(self, node: fx.Node) -> str:
        if node in self.lora:
            return self.lora[node].path
        if node in self.calls:
            return self.calls[node]
        if node in self.raw:
            return self.raw[node]
        if self._is_handed_on(node):
            return self._site_read(node)
        return str(node.target) if node.op == "call_module" else str(node.meta.get("place", ""))

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

    def _read(self, node: fx.Node) -> Attached | None:
        """Return the adapter of the weight that the node reads, if it has one that shows in it."""
        owner, _, last = str(node.target).rpartition(".")
        module = self.module.get_submodule(owner) if node.op == "get_attr" else None
        return attached(module, last) if module is not None and last in shown_parameters(module) else None

    def _adapter(self, node: fx.Node) -> str:
        found = self._read(node) if node.op == "get_attr" else self._at(self._site(node))
        return "" if found is None else describe_spec(found.spec)

    def _at(self, path: str) -> Attached | None:
        """Return the adapter at a site: of a module, or of a raw parameter."""
        owner, _, last = path.rpartition(".")
        above = self.module.get_submodule(owner)
        if last in above._parameters:
            return attached(above, last)
        return attached(self.module.get_submodule(path))

    def _statement(self, node: fx.Node) -> str | None:
        if node.op in ("placeholder", "get_attr"):
            code = str(node.target) if node.op == "placeholder" else self._attribute(node)
            if not self._is_handed_on(node):
                self.names[node] = code
                return None
            self.names[node] = f"{_stem(node)}_weight"
            return f"{self.names[node]} = {code}"
        code = self._lora_code(self.lora[node]) if node in self.lora else self._code(node)
        if node.op == "output":
            return f"return {self._value(node.args[0])}"
        self.names[node] = self._name(node)
        return f"{self.names[node]} = {code}"

    def _attribute(self, node: fx.Node) -> str:
        found = self._read(node)
        if found is None:
            return f"self.{node.target}"
        owner, _, last = str(node.target).rpartition(".")
        home = owner if found.home is found.owner else dotted(owner, last + HOME)
        B, A = (f"self.{dotted(home, factor)}" for factor in ("lora_B", "lora_A"))
        delta = f"{B} @ {A}" if found.spec.layout == "out_in" else f"({B} @ {A}).T"
        return f"(self.{node.target} + {delta} * {found.spec.scaling})"

    def _name(self, node: fx.Node) -> str:
        source = self.lora[node].base if node in self.lora else node
        stem = _stem(source)
        self.taken[stem] += 1
        return stem if self.taken[stem] == 1 else f"{stem}_{self.taken[stem]}"

    def _lora_code(self, found: LoRANodes) -> str:
        by_kind = {_factor_of(node): node for node in found.between}
        if "lora_A" not in by_kind:
            return self._raw_code(found)
        lora_a, lora_b = by_kind["lora_A"], by_kind["lora_B"]
        scaled = lora_b.args[0]
        assert isinstance(scaled, fx.Node)
        x = self._lora_input(lora_a)
        inner = f"self.{found.path}.lora_B(self.{found.path}.lora_A({x}) * {self._value(scaled.args[1])})"
        cast = ".to(base)" if any(node.target == "type_as" for node in found.between) else ""
        if _factor_of(found.result) == "lora_magnitude_vector":
            return f"self.{found.path}.lora_magnitude_vector({self._code(found.base)}, {inner}{cast})"
        return f"{self._code(found.base)} + {inner}{cast}"

    def _raw_code(self, found: LoRANodes) -> str:
        """Return the statement of a product with a raw parameter: its inner nodes are many, and say no more."""
        adapter = self._at(found.path)
        scaling = "" if adapter is None else f" * {adapter.spec.scaling}"
        return f"{self._code(found.base)} + self.{found.path}_lora(..){scaling}"

    def _lora_input(self, lora_a: fx.Node) -> str:
        x = lora_a.args[0]
        assert isinstance(x, fx.Node)
        if _factor_of(x) == "lora_dropout":
            return f"dropout({self._value(x.args[0])})"
        return self._value(x)

    def _code(self, node: fx.Node) -> str:
        arguments = [self._value(each) for each in node.args]
        arguments += [f"{key}={self._value(value)}" for key, value in node.kwargs.items()]
        if node.op == "call_module":
            return f"self.{node.target}({', '.join(arguments)})"
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        return f"{_function_name(node.target)}({', '.join(arguments)})"

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, tuple):
            return f"({', '.join(map(self._value, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key!r}: {self._value(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._value(value.start)}, {self._value(value.stop)}, {self._value(value.step)})"
        return repr(value)


def describe_spec(spec: AdapterSpec) -> str:
    """Return `rule attention · r=8 scaling=2`."""
    name = spec.rule if spec.rule.startswith("rule ") else f"rule {spec.rule}"
    return f"{f'{name} · ' if spec.rule else ''}r={spec.lora.r} scaling={spec.scaling:g}"


def _factor_of(node: fx.Node) -> str:
    """Return lora_A, lora_B or lora_dropout for a call of an adapter's module, else ""."""
    match = (
        re.search(r"\.(lora_A|lora_B|lora_dropout|lora_magnitude_vector)\.[^.]+(\.\d+)?$", str(node.target))
        if node.op == "call_module"
        else None
    )
    return match[1] if match else ""


def _stem(node: fx.Node) -> str:
    """Return a name for what a node computes: the last parts of a module's path, or the function's name."""
    if node.op in ("call_module", "get_attr"):
        path = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
        parts = [part for part in path.split(".") if not part.isdigit()]
        return "_".join(parts[-2:]) or "module"
    name = _function_name(node.target).removeprefix("torch.").removeprefix("F.")
    return re.sub(r"\W", "", name.partition(".")[0]) or "value"  # aten's `linear.default` is called linear


def _function_name(target: Any) -> str:
    if isinstance(target, str):
        return target
    name = str(target.__name__)
    home = str(target.__module__ or "")
    if home in ("torch._C._nn", "torch.nn.functional"):
        return f"F.{name}"
    return f"torch.{name}" if home.startswith("torch") and "." not in name else name
