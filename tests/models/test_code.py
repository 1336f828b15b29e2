"""A name is never read as code: whatever modules, tensors, attributes and arguments are called."""

import copy
import enum
import warnings

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import RefusedError
from lora_fx.capture.symbolic import capture_symbolically
from lora_fx.models import code
from lora_fx.models.code import UncompiledGraph, attribute, compiled, copied_graph, refuse_odd_names, stays_itself
from lora_fx.passes.contract import rewrite
from lora_fx.passes.editor import Editor
from lora_fx.regions.checking import REGION

RULES = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]}
WRITTEN = ["plain", "_1", "größe", "λ", "my layer", "0", "it's", "#", "%s", "{x}", "«n»", "x[0]"]
"""Names that torch.fx writes so that they stay themselves."""
ODD = ['a"b', "a\\b", "a\\", "a\nb", "a\tb", "\0", "class", "None", "\ufb01", "\x1b[0m", "\u202e", '"""', "\ud800"]
"""Names that it does not: they end the text they stand in, are keywords, or are read as others ("ﬁ" as "fi")."""


class Block(nn.Module):
    """Has modules, a parameter, an attribute and an argument of one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleDict({f"{name}": nn.Linear(4, 4), "fi": nn.Linear(4, 4)})
        self.register_parameter(f"w{name}", nn.Parameter(torch.randn(4)))
        setattr(self, f"k{name}", 2.0)

    def forward(self, x, **given):
        scaled = self.layers[self.name](x) * getattr(self, f"w{self.name}") * getattr(self, f"k{self.name}")
        for value in given.values():
            scaled = scaled + value
        return scaled


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.blocks = nn.ModuleList([Block(name), Block(name)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, **{f"given{self.name}": x})
        return x


class Holds(nn.Module):
    """Straight-line code: it can be captured without inputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4)})

    def forward(self, x):
        return self.layers[self.name](x)


@pytest.mark.parametrize("name", [*WRITTEN, *ODD], ids=ascii)
def test_blocks_run_as_graphs_whatever_their_modules_parameters_attributes_and_arguments_are_called(name):
    torch.manual_seed(0)
    model, x = Model(name), torch.randn(3, 4)
    adapted = lora_fx.apply(model, RULES, example_inputs=(x,))
    regions = [vars(module)[REGION] for module in adapted.modules() if REGION in vars(module)]
    assert [len(region.block.programs) for region in regions] == [1, 1]
    assert torch.equal(adapted(x), model(x))
    for parameter in lora_fx.parameters(adapted):
        nn.init.normal_(parameter)
    on_modules = lora_fx.apply(model, RULES, backend="modules")
    on_modules.load_state_dict(adapted.state_dict())
    assert torch.equal(adapted(x), on_modules(x))
    assert sum(region.hits for region in regions) == 4
    assert not any(region.misses for region in regions)


@pytest.mark.parametrize("name", [*WRITTEN, *ODD], ids=ascii)
def test_plan_without_inputs_and_the_graphs_of_a_diff_take_any_name(name):
    model = Holds(name)
    assert len(lora_fx.plan(model, RULES).adapted) == 1
    assert [node.target for node in capture_symbolically(model).graph.nodes if node.op == "call_module"] == [
        f"layers.{name}"
    ]
    adapted = lora_fx.apply(model, RULES, example_inputs=(torch.randn(2, 4),))
    assert not lora_fx.diff(model, model, (torch.randn(2, 4),)).changes
    assert lora_fx.diff(model, adapted, (torch.randn(2, 4),)).changes


@pytest.mark.parametrize("name", [*WRITTEN, *ODD], ids=ascii)
def test_source_that_reads_an_attribute_reads_the_one_of_this_name(name):
    class Holder:
        pass

    holder = Holder()
    setattr(holder, name, 1)
    assert eval(attribute("x", name), {"x": holder}) == 1


@pytest.mark.parametrize("name", WRITTEN)
def test_names_that_stay_themselves_are_written_by_torch_and_read_back(name):
    traced = fx.symbolic_trace(Holds(name))
    refuse_odd_names(traced.graph)
    x = torch.randn(2, 4)
    assert torch.equal(traced(x), traced.get_submodule(f"layers.{name}")(x))


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_graph_of_ones_own_is_not_compiled_with_a_name_that_would_not_stay_itself(name):
    model = UncompiledGraph(Holds(name), fx.Tracer().trace(Holds(name)))
    assert not stays_itself(name)
    editor = Editor(model)
    editor.set_tensor(f"layers.{name}.weight", nn.Parameter(torch.zeros(4, 4)), "")
    with pytest.raises(match="nothing was compiled") as refused:
        editor.finish()
    assert ascii(f"layers.{name}") in dict(refused.value.refusals)


@pytest.mark.parametrize("backend", ["auto", "modules"])
def test_graph_module_whose_code_calls_another_module_than_its_graph_says_is_refused(backend):
    traced, x = fx.symbolic_trace(Calls("\ufb01")), torch.randn(2, 4)
    assert torch.equal(traced(x), traced.get_submodule("layers.fi")(x))  # seen with torch 2.13: findings/
    with pytest.raises(RefusedError, match="do not stay names"):
        lora_fx.apply(traced, RULES, (x,), backend=backend)


class Calls(nn.Module):
    """Calls one of two layers, whose names Python takes for one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleDict({"\ufb01": nn.Linear(4, 4), "fi": nn.Linear(4, 4)})

    def forward(self, x):
        return self.layers[self.name](x) + 0 * self.layers["fi"](x)


def _graph(op, target, args=(), kwargs=None):
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node(op, target, (x, *args), kwargs or {}))
    return graph


@pytest.mark.parametrize(
    "graph",
    [
        _graph("call_method", 'add"'),
        _graph("call_method", "class"),
        _graph("call_function", torch.add, (1,), {"al pha": 2}),
        _graph("call_function", getattr, ("class",)),
        _graph("call_function", torch.add, (enum.Enum("Odd", {"a b": 1})["a b"],)),
    ],
    ids=["method", "keyword as method", "argument", "attribute", "member of an enumeration"],
)
def test_names_that_have_no_alias_are_refused(graph):
    with pytest.raises(RefusedError):
        compiled(graph, "<test>")


def test_call_with_an_argument_whose_name_cannot_be_written_is_not_captured_and_runs_as_it_is():
    class Inner(nn.Module):
        def forward(self, x, **given):
            return x + sum(given.values())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.inner = nn.Linear(4, 4), torch.compiler.disable(Inner())

        def forward(self, x):
            return self.inner(self.layer(x), **{'odd "key"': x})

    model, x = Outer(), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = lora_fx.apply(model, RULES, example_inputs=(x,))
    assert torch.equal(adapted(x), model(x))


@pytest.mark.parametrize("name", ["ok", 'a"b', "a\nb", "\ufb01"], ids=ascii)
def test_exported_program_is_unpacked_only_if_its_names_stay_themselves(name):
    program = torch.export.export(Holds(name), (torch.randn(2, 4),), strict=False)
    if name == "ok":
        assert isinstance(code.module_of(program), nn.Module)
        return
    with pytest.raises(RefusedError):
        code.module_of(program)
    with pytest.raises(RefusedError):
        lora_fx.remerge(program)


def test_program_is_not_exported_with_names_that_nobody_could_read_back(tmp_path):
    adapted = lora_fx.apply(Holds('a"b'), RULES)
    with pytest.raises(match="rename"):
        lora_fx.export(adapted, tmp_path / "m.pt2", "pt2", example_inputs=(torch.randn(2, 4),))
    assert not list(tmp_path.iterdir())


def test_uncompiled_graph_makes_no_source(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("source was made")

    traced = fx.symbolic_trace(Holds("ok"))
    monkeypatch.setattr(fx.Graph, "python_code", fail)
    held = UncompiledGraph(traced, traced.graph)
    rewrite_nothing = Editor(held)
    rewrite_nothing.finish()
    assert rewrite(held).modified is False


def test_copy_of_a_graph_is_that_of_deepcopy():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y", torch.Tensor)
    both = graph.call_function(torch.cat, ([x, y],), {"dim": 0})
    both.meta["site"] = "a"
    part = graph.call_method("narrow", (both, 0), {"start": 1, "length": 2})
    graph.output({"part": part, "both": (both, slice(None, None, 2))})
    made, expected = copied_graph(graph), copy.deepcopy(graph)
    made.lint()

    def facts(of: fx.Graph) -> list[object]:
        return [
            (n.op, n.target, n.name, n.type, str(n.args), str(n.kwargs), n.meta, [*map(str, n.users)]) for n in of.nodes
        ]

    assert facts(made) == facts(expected)
    assert made.python_code("self").src == expected.python_code("self").src
    assert len(made.find_nodes(op="call_function", target=torch.cat)) == 1
    next(iter(made.nodes)).meta["new"] = True
    assert all(node.graph is made for node in made.nodes)
    assert facts(graph) == facts(expected)
