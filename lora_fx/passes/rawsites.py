"""Raw parameters in a graph: the products that they take part in, and the LoRA nodes beside them.

The graph of `w = self.w; y = x @ w; y = y.relu(); return y`, with an adapter at `w` (in × out, r = 2, alpha = 4):

    before                     after

    w = self.w                 w = self.w
    matmul = x @ w             matmul = x @ w
                               a = self.w_lora.lora_A.default.weight      # r × in
                               b = self.w_lora.lora_B.default.weight      # out × r
                               transpose = b.transpose(-1, -2)
                               transpose_1 = a.transpose(-1, -2)
                               matmul_1 = torch.matmul(x, transpose_1)    # … × r: W + ΔW is never computed
                               mul = matmul_1 * 2.0                       # alpha / r
                               matmul_2 = torch.matmul(mul, transpose)
                               add = matmul + matmul_2
    relu = matmul.relu()       relu = add.relu()
    return relu                return relu
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import map_arg

from lora_fx.adapters.attach import HOME, Attached, attached
from lora_fx.adapters.factors.kinds import SharedFactor, SlicedB
from lora_fx.adapters.factors.moved import MovedFactor
from lora_fx.adapters.rawweight.factored import Factored
from lora_fx.adapters.rawweight.products import COPIES, VIEWS, Call, name_of, product
from lora_fx.adapters.rawweight.views import WeightView
from lora_fx.models.layers import kind_of
from lora_fx.models.tensors import dotted
from lora_fx.passes.editor import Editor, Writer
from lora_fx.planning.sites import Layout

LENGTHS = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class GraphUse:
    """One use of a raw parameter in a graph."""

    parameter: str
    """Its dotted name."""
    node: fx.Node
    """The node that uses it."""
    weight: fx.Node
    """The operand of that node that shows the parameter."""
    view: WeightView
    op: str = ""
    """How the node multiplies; empty where it is not a product and needs the whole weight."""
    layout: Layout | None = None


def raw_uses(graph_module: fx.GraphModule) -> Iterator[GraphUse]:
    """Yield every use of a raw matrix in the graph, after views and casts, in the graph's order.

    A `weight` that F.linear takes from its module is not a raw parameter (`sites.site_calls`).
    """
    shown: dict[fx.Node, tuple[str, WeightView | list[WeightView]]] = {}
    linears = {
        str(node.target)
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and any(name_of(user.target) == "linear" for user in node.users)
    }
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            whole = _whole(graph_module, node)
            is_linear = node.target in linears and node.target.endswith(".weight")
            if whole is not None and not is_linear:
                shown[node] = (str(node.target), whole)
            continue
        for weight in dict.fromkeys(operand for operand in node.all_input_nodes if operand in shown):
            name, view = shown[weight]
            seen = _seen_through(node, weight, view)
            if seen is not None:
                shown[node] = (name, seen)
            elif isinstance(view, WeightView) and node.op != "output":
                yield _use(node, weight, name, view)


def computed_uses(graph_module: fx.GraphModule) -> Iterator[GraphUse]:
    """Yield every product by what is made from raw matrices alone: joined, masked, scaled by a vector or a buffer.

    Its `weight` is what was made; each axis counts as staying where it was.
    """
    made: dict[fx.Node, tuple[frozenset[str], Any, bool]] = {}
    for node in graph_module.graph.nodes:
        known = [made[operand] for operand in node.all_input_nodes if operand in made]
        if node.op == "get_attr":
            whole = _whole(graph_module, node)
            made[node] = (frozenset([str(node.target)] if whole is not None else ()), whole, False)
        elif node.op in ("call_function", "call_method") and known and len(known) == len(node.all_input_nodes):
            view = next((view for _, view, _ in known if view is not None), None)
            shown = _seen_through(node, node.all_input_nodes[0], view)
            names = frozenset(name for names, _, _ in known for name in names)
            made[node] = (names, view if shown is None else shown, shown is None or any(new for *_, new in known))
        elif node.op != "output":
            for weight in (operand for operand in node.all_input_nodes if operand in made):
                names, view, is_new = made[weight]
                if is_new and isinstance(view, WeightView):
                    yield from (use for name in sorted(names) if (use := _use(node, weight, name, view)).op)


def _whole(graph_module: fx.GraphModule, node: fx.Node) -> WeightView | None:
    owner, _, last = str(node.target).rpartition(".")
    module = graph_module.get_submodule(owner)
    parameter = module._parameters.get(last) if isinstance(module, nn.Module) else None
    if parameter is None or parameter.dim() < 2 or (last == "weight" and kind_of(module) is not None):
        return None
    adapter = attached(module, last)
    convolves = any(name_of(user.target).startswith("conv") for user in node.users)
    banked = parameter.dim() == 3 and not convolves if adapter is None else adapter.spec.site.is_banked
    return WeightView.of(tuple(parameter.shape), banked)


def _seen_through(node: fx.Node, weight: fx.Node, view: Any) -> Any:
    """Return what of the weight a node shows, if it is a view or a cast of it; None if it is something else."""
    name = name_of(node.target)
    if node.op not in ("call_function", "call_method") or not node.args or node.args[0] is not weight:
        return None
    if name == "getattr" and node.args[1] in ("T", "mT") and isinstance(view, WeightView):
        return view.through(operator.attrgetter(str(node.args[1])))
    if isinstance(view, list):
        return view[node.args[1]] if name == "getitem" and isinstance(node.args[1], int) else None
    if name in COPIES:
        return view
    if name not in VIEWS or any(operand is not weight for operand in node.all_input_nodes):
        return None
    if node.op == "call_method":
        return view.through(operator.methodcaller(name, *node.args[1:], **node.kwargs))
    function: Any = node.target
    return view.through(lambda stub: function(stub, *node.args[1:], **node.kwargs))


class _Product(NamedTuple):
    """Which product a call makes, and of what."""

    kind: str
    args: tuple[Any, ...]

    def __mul__(self, factor: Any) -> "_Product":
        """Return itself: `alpha` changes nothing about which product it is."""
        return self


class _Probe:
    """Stands for a low-rank weight, to see which product a call makes of it."""

    def __getattr__(self, name: str) -> Callable[..., _Product]:
        return lambda *args, **_: _Product(name, args)


def _use(node: fx.Node, weight: fx.Node, name: str, view: WeightView) -> GraphUse:
    called = name_of(node.target)
    delta = product(called, Call(node.args, node.kwargs, weight)) if node.op != "call_module" else None
    if delta is None:
        return GraphUse(name, node, weight, view)
    kind, args = delta(_Probe(), lambda x: x)  # type: ignore[misc,arg-type]
    if kind == "embedding":
        return GraphUse(name, node, weight, view, "embedding", "in_out")
    if kind == "convolution":
        return GraphUse(name, node, weight, view, called, "out_in")
    op = "experts" if view.banked and called != "einsum" else "linear" if kind == "linear" else "matmul"
    return GraphUse(name, node, weight, view, op, _layout(kind, args, view))


def _layout(kind: str, args: tuple[Any, ...], view: WeightView) -> Layout | None:
    """Return which way round the parameter is stored: its columns are summed over, or its rows."""
    assert view.dims is not None
    if kind == "einsum":
        sides, _, result = args[0].replace(" ", "").partition("->")
        letters = sides.split(",")[args[1]]
        summed = {view.dims[i].kind for i, letter in enumerate(letters) if letter not in result and i < len(view.dims)}
    else:
        summed = {view.dims[-2 if kind in ("matmul", "grouped") else -1].kind} if len(view.dims) > 1 else set()
    if summed == {"second"}:
        return "out_in"
    return "in_out" if summed == {"first"} else None


# -- writing

_MADE = (SharedFactor, SlicedB, MovedFactor)
"""Factors whose matrix is not their `weight`: it is made by a call."""


def splice_raw(editor: Editor) -> None:
    """Write the LoRA nodes of every adapted raw parameter at each of its uses; W + ΔW where it is not a product.

    DoRA's weight is computed as a whole where the parameter is read.
    """
    whole: dict[str, tuple[Attached, str]] = {}
    for use in list(raw_uses(editor.graph_module)):
        owner, _, name = use.parameter.rpartition(".")
        adapter = attached(editor.graph_module.get_submodule(owner), name)
        if adapter is None:
            continue
        home = owner if adapter.home is adapter.owner else use.parameter + HOME
        if adapter.magnitude is None:
            _splice(editor, use, adapter, home)
        else:
            whole[use.parameter] = adapter, home
    for node in list(editor.graph.nodes):
        if node.op == "get_attr" and node.target in whole:
            _splice_whole(editor, node, *whole[str(node.target)])


def _splice_whole(editor: Editor, node: fx.Node, adapter: Attached, home: str) -> None:
    """Let all that reads a parameter read m · V / ‖V‖ instead, which one node makes."""
    path = str(node.target)
    with editor.writing_after(node, path) as write:
        A, B = factors_in(write, adapter, home)
        magnitude = write.module(dotted(home, LENGTHS, adapter.spec.adapter))
        whole = magnitude(write.proxy(node), A, B).node
    editor.replace_uses(node, whole, path, but=lambda user: user is whole)


def _splice(editor: Editor, use: GraphUse, adapter: Attached, home: str) -> None:
    if use.op and _write_product(editor, use, adapter, home):
        return
    with editor.writing_after(use.weight, use.parameter) as write:
        low = _low_rank(write, use, adapter, home)
        whole = write.proxy(use.weight) + low.dense().type_as(write.proxy(use.weight))
    editor.replace_operand(use.node, use.weight, whole.node, use.parameter)


def _write_product(editor: Editor, use: GraphUse, adapter: Attached, home: str) -> bool:
    """Write base + low-rank product after the node; False, with nothing written, if it does not factor."""
    name, spec = adapter.spec.adapter, adapter.spec
    with editor.writing_after(use.node, use.parameter) as write:

        def given(x: Any) -> Any:
            if adapter.dropout is not None:
                x = write.module(dotted(home, f"lora_dropout.{name}"))(x)
            return x.to(adapter.lora_A.weight.dtype) if spec.mixed and use.op != "embedding" else x

        # only now: what makes the other operand may have been adapted just before
        operand: Any = lambda node: node if node is use.weight else write.proxy(node)  # noqa: E731
        mapped: Any = map_arg((use.node.args, use.node.kwargs), operand)
        args, kwargs = mapped
        delta = product(name_of(use.node.target), Call(args, kwargs, use.weight))
        assert delta is not None
        low = delta(_low_rank(write, use, adapter, home), given)
        if low is not None:
            result = write.proxy(use.node) + (low.type_as(write.proxy(use.node)) if spec.mixed else low)
    if low is None:
        for node in reversed(write.added):
            editor.erase(node, use.parameter)
        return False
    editor.replace_uses(use.node, result.node, use.parameter, but=lambda user: user in write.added)
    return True


def _low_rank(write: Writer, use: GraphUse, adapter: Attached, home: str) -> Factored:
    """Return the low-rank weight with proxies for its factors."""
    spec = adapter.spec
    return Factored.of(use.view, *factors_in(write, adapter, home), spec.site.layout, spec.rank, spec.scaling)


def factors_in(write: Writer, adapter: Attached, home: str) -> tuple[Any, Any]:
    """Write reads of both factors, which `home` holds: as matrices, but for a convolution's filters."""
    paths = (dotted(home, name, adapter.spec.adapter) for name in ("lora_A", "lora_B"))
    A, B = (
        write.module(path)() if isinstance(factor, _MADE) else write.attribute(dotted(path, "weight"))
        for path, factor in zip(paths, (adapter.lora_A, adapter.lora_B), strict=True)
    )
    return A, B


# -- finding again


@dataclass(frozen=True, slots=True)
class LoRANodes:
    """The LoRA subgraph at one use of a weight: base + [type_as] B (scaling · A [dropout] x)."""

    path: str
    base: fx.Node
    result: fx.Node
    between: tuple[fx.Node, ...]
    """Every node that the adapter added, the result included, last first."""


def raw_lora_nodes(graph_module: fx.GraphModule) -> Iterator[LoRANodes]:
    """Yield every LoRA subgraph of a raw parameter: what is computed from its factors, up to where it is added."""
    low: dict[fx.Node, tuple[str, frozenset[fx.Node]]] = {}
    for node in list(graph_module.graph.nodes):
        if (whole := _whole_path(node)) is not None:
            yield LoRANodes(whole, node.all_input_nodes[0], node, (node, *reversed(node.all_input_nodes[1:])))
            continue
        path = _factor_path(node)
        inputs = [operand for operand in node.all_input_nodes if operand in low]
        if path is not None:
            low[node] = (path, frozenset({node}))
        elif inputs and node.target is operator.add and node.args[0] not in low:
            path, _ = low[inputs[0]]
            inside = frozenset(n for operand in inputs for n in low[operand][1]) | {node}
            order = [inner for inner in graph_module.graph.nodes if inner in inside]
            assert isinstance(node.args[0], fx.Node)
            yield LoRANodes(path, node.args[0], node, tuple(reversed(order)))
        elif inputs:
            methods = {x for x in node.all_input_nodes if x.op == "call_method"}
            casts = {x for x in methods if x.target == "to" and list(x.users) == [node]}  # for this product alone
            nearby = (*node.all_input_nodes, *(x for cast in casts for x in cast.all_input_nodes))
            dropped = {operand for operand in nearby if is_dropout(operand)}
            inside = frozenset({node, *dropped, *casts, *(n for operand in inputs for n in low[operand][1])})
            low[node] = (low[inputs[0]][0], inside)


def _factor_path(node: fx.Node) -> str | None:
    """Return the parameter whose factor a node reads, if it reads one of a raw parameter."""
    if node.op != "get_attr" and not (node.op == "call_module" and not node.args):
        return None
    parts = str(node.target).split(".")
    factor = next((name for name in ("lora_A", "lora_B") if name in parts), None)
    if factor is None:
        return None
    if all(f"{LENGTHS}." in str(user.target) for user in node.users):  # DoRA's, of a layer or a whole weight
        return None
    return _parameter_of(parts[: parts.index(factor)])


def _whole_path(node: fx.Node) -> str | None:
    """Return the raw parameter of which a node makes DoRA's weight; None for any other node."""
    if node.op != "call_module" or f"{LENGTHS}." not in str(node.target) or node.kwargs:  # a layer's gets keywords
        return None
    parts = str(node.target).split(".")
    return _parameter_of(parts[: parts.index(LENGTHS)])


def _parameter_of(home: list[str]) -> str:
    """Return the name of the parameter whose adapter lies at a path."""
    *before, last = ["", *home]
    if last.endswith(HOME):  # by name: a graph that is shown without its model has lost the class
        return dotted(*before, last.removesuffix(HOME))
    return dotted(*before, last, "weight")


def is_dropout(node: fx.Node) -> bool:
    """Whether a node is the dropout of an adapter."""
    return node.op == "call_module" and "lora_dropout." in str(node.target)
