"""Passes on torch.fx.GraphModules: each alone, on graphs that users traced or exported themselves."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import passes
from lora_fx.adapters.attach import attached
from lora_fx.errors import InvariantError, MergeError, NoMatchError, RefusedError
from lora_fx.passes.inject import Inject
from lora_fx.passes.merge import Merge
from lora_fx.passes.remove import Remove
from lora_fx.passes.verify import INVARIANTS, Verify, verify
from tests.support import zoo
from tests.support.zoo import rules


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(zoo.Mlp().eval())


def exported() -> fx.GraphModule:
    torch.manual_seed(0)
    return torch.export.export(zoo.Mlp().eval(), (zoo.features(2, 3),)).module()


def exported_dynamic() -> fx.GraphModule:
    torch.manual_seed(0)
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    return torch.export.export(zoo.Mlp().eval(), (zoo.features(2, 3),), dynamic_shapes=sizes).module()


GRAPHS = pytest.mark.parametrize("make", [traced, exported, exported_dynamic], ids=lambda function: function.__name__)
X = zoo.features(2, 3)


def plan_for(graph_module: fx.GraphModule, **lora: object) -> lora_fx.Plan:
    return lora_fx.plan(graph_module, rules("fc{1,2}", **lora))


@GRAPHS
def test_plan_of_a_graph_module_lists_its_linears_without_running_it(make):
    plan = plan_for(make())
    assert [(site.path, site.shape, site.backend, site.calls) for site in plan.sites] == [
        ("fc1", (32, 16), "graph", 1),
        ("fc2", (16, 32), "graph", 1),
    ]


@GRAPHS
@pytest.mark.parametrize("lora", [{}, {"dropout": 0.1}, {"dora": True}], ids=str)
def test_graph_module_comes_back_rewritten_and_computes_what_it_computed(make, lora):
    graph_module = make()
    before = str(graph_module.graph)
    tuned = lora_fx.apply(graph_module, rules("**", **lora))
    assert isinstance(tuned, fx.GraphModule)
    assert str(graph_module.graph) == before
    assert set(graph_module.state_dict()) < set(tuned.state_dict())
    assert torch.equal(tuned(X), graph_module(X))
    zoo.randomise_(tuned)
    assert not torch.equal(tuned(X), graph_module(X))
    tuned.graph.lint()


def test_lora_subgraph_is_visible_node_by_node():
    tuned = lora_fx.apply(traced(), rules("fc1", r=4, alpha=8, dropout=0.1))
    nodes = [(node.op, str(node.target)) for node in tuned.graph.nodes if node.meta.get("site") == "fc1"]
    assert nodes == [
        ("call_module", "fc1.lora_dropout.default"),
        ("call_module", "fc1.lora_A.default"),
        ("call_function", str(operator.mul)),
        ("call_module", "fc1.lora_B.default"),
        ("call_function", str(operator.add)),
    ]
    assert "self.fc1.lora_A.default" in tuned.code


@GRAPHS
def test_adapted_graph_module_trains_only_its_adapter(make):
    tuned = lora_fx.apply(make(), rules("**"))
    assert {name for name, p in tuned.named_parameters() if p.requires_grad} == {
        f"{site}.lora_{factor}.default.weight" for site in ("fc1", "fc2") for factor in "AB"
    }
    tuned(X).square().sum().backward()
    assert all(p.grad is not None for p in lora_fx.parameters(tuned))
    assert all(p.grad is None for name, p in tuned.named_parameters() if ".lora_" not in name)


@GRAPHS
@pytest.mark.parametrize("lora", [{}, {"dora": True}], ids=str)
def test_merge_and_remove_leave_no_lora_node_and_the_base_keys(make, lora):
    graph_module = make()
    tuned = lora_fx.apply(graph_module, rules("**", **lora))
    zoo.randomise_(tuned)
    merged, removed = lora_fx.merge(tuned), lora_fx.remove(tuned)
    for plain in (merged, removed):
        assert isinstance(plain, fx.GraphModule)
        assert set(plain.state_dict()) == set(graph_module.state_dict())
        assert len(plain.graph.nodes) == len(graph_module.graph.nodes)
        assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in graph_module.parameters()]
    assert torch.equal(removed(X), graph_module(X))
    torch.testing.assert_close(merged(X), tuned(X), rtol=1e-5, atol=1e-5)


@GRAPHS
def test_disabled_graph_module_computes_its_base_and_its_layers_take_over(make):
    graph_module = make()
    tuned = lora_fx.apply(graph_module, rules("**", init="random"))
    expected = tuned(X)
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(X), graph_module(X))
    assert [node.name for node in tuned.graph.nodes] == [node.name for node in graph_module.graph.nodes]
    torch.testing.assert_close(tuned(X), expected, rtol=1e-5, atol=1e-5)


@GRAPHS
def test_ask_alone_leaves_its_input_as_it_was(make):
    tuned = lora_fx.apply(make(), rules("**", init="random"))
    nodes = [node.name for node in tuned.graph.nodes]
    result = passes.run(tuned, [passes.Ask(), passes.Verify()])
    assert [node.name for node in tuned.graph.nodes] == nodes
    assert list(result.graph_module.state_dict()) == list(tuned.state_dict())
    torch.testing.assert_close(result.graph_module(X), tuned(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_adapter_of_a_graph_module_survives_copies(duplicate):
    base = fx.symbolic_trace(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
    tuned = lora_fx.apply(base, rules("**", init="random"))
    other = duplicate(tuned)
    assert torch.equal(other(X), tuned(X))
    assert [site.rule for site in lora_fx.inspect(other).sites] == ["rule 1", "rule 1"]
    torch.testing.assert_close(lora_fx.merge(other)(X), tuned(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(lora_fx.remove(other)(X), base(X))


@GRAPHS
def test_adapter_of_a_graph_module_can_be_saved_and_loaded(make, tmp_path):
    tuned = lora_fx.apply(make(), rules("**", init="random"))
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(lora_fx.load(make(), tmp_path)(X), tuned(X))


def test_adapter_saved_from_a_model_loads_into_its_exported_graph(tmp_path):
    torch.manual_seed(0)
    tuned = lora_fx.apply(zoo.Mlp().eval(), rules("**", init="random"), (X,))
    lora_fx.save(tuned, tmp_path)
    torch.testing.assert_close(lora_fx.load(exported(), tmp_path)(X), tuned(X), rtol=1e-6, atol=1e-6)


def test_module_called_twice_is_adapted_at_both_calls():
    torch.manual_seed(0)
    graph_module = fx.symbolic_trace(zoo.Shared().eval())
    tuned = lora_fx.apply(graph_module, rules("a", init="random"))
    assert sum("a.lora_A" in str(node.target) for node in tuned.graph.nodes) == 2
    modules = lora_fx.apply(zoo.Shared().eval(), rules("a"), backend="modules")
    modules.load_state_dict(tuned.state_dict(), strict=False)  # tracing drops the second name, b
    torch.testing.assert_close(tuned(X), modules(X), rtol=1e-6, atol=1e-6)  # node by node, and as one operation


def test_merging_a_tied_head_leaves_the_embedding_of_an_exported_graph_alone():
    torch.manual_seed(0)
    tokens = zoo.tokens(2, 6)
    graph_module = torch.export.export(zoo.Gpt().eval(), (tokens,)).module()
    tuned = lora_fx.apply(graph_module, rules("lm_head", init="random"))
    merged = lora_fx.merge(tuned)
    torch.testing.assert_close(merged(tokens), tuned(tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.wte.weight, graph_module.wte.weight)
    assert not torch.equal(merged.lm_head.weight, graph_module.lm_head.weight)


class ReadsHead(nn.Module):
    """The head's weight serves as the embedding, under no name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, zoo.VOCABULARY, bias=False)

    def forward(self, ids):
        return self.head(nn.functional.embedding(ids, self.head.weight))


def test_merge_refuses_a_weight_that_others_read_under_no_other_name():
    tuned = lora_fx.apply(fx.symbolic_trace(ReadsHead()), rules("head"))
    with pytest.raises(MergeError) as caught:
        lora_fx.merge(tuned)
    assert caught.value.problems == (("head.weight", "embedding reads it too, and must not change"),)


class HidesLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.layer(x))


def test_linears_inside_a_leaf_of_the_graph_are_adapted_by_the_module_backend():
    torch.manual_seed(0)
    graph_module = fx.symbolic_trace(HidesLinear().eval())
    plan = lora_fx.plan(graph_module, rules("**.linear1"))
    assert [(s.path, s.backend) for s in plan.adapted] == [("layer.linear1", "module")]
    tuned = lora_fx.apply(graph_module, rules(["out", "**.linear1"], init="random"))
    assert {s.path: s.backend for s in lora_fx.inspect(tuned).sites} == {"layer.linear1": "module", "out": "graph"}
    with torch.no_grad():
        torch.testing.assert_close(lora_fx.merge(tuned)(X), tuned(X), rtol=1e-5, atol=1e-5)
        assert torch.equal(lora_fx.remove(tuned)(X), graph_module(X))


# -- each pass alone


def test_inject_alone_returns_a_copy_and_keeps_a_journal():
    graph_module = traced()
    before = str(graph_module.graph)
    result = passes.run(graph_module, [Inject(plan_for(graph_module))])
    assert str(graph_module.graph) == before
    assert result.modified
    assert result.journal.count("add node") == 8
    assert result.journal.count("replace uses") == 2
    assert {edit.site for edit in result.journal.edits} == {"fc1", "fc2"}
    assert {edit.by for edit in result.journal.edits} == {"inject"}
    assert torch.equal(result.graph_module(X), graph_module(X))


def test_merge_alone_folds_and_its_journal_counts_every_edit():
    tuned = passes.run(traced(), [Inject(plan_for(traced(), init="random"))]).graph_module
    result = passes.run(tuned, [Merge()])
    assert result.journal.count("erase node") == 8
    assert result.journal.count("set weight") == 2
    torch.testing.assert_close(result.graph_module(X), tuned(X), rtol=1e-5, atol=1e-5)
    assert any(adapter is not None for adapter in map(attached, tuned.modules())), "the input stays adapted"


def test_remove_undoes_inject():
    graph_module = traced()
    tuned = passes.run(graph_module, [Inject(plan_for(graph_module))]).graph_module
    result = passes.run(tuned, [Remove()])
    assert str(result.graph_module.graph) == str(graph_module.graph)
    assert set(result.graph_module.state_dict()) == set(graph_module.state_dict())


def test_passes_run_one_after_another():
    graph_module = traced()
    result = passes.run(graph_module, [Inject(plan_for(graph_module)), Verify(), Remove()])
    assert torch.equal(result.graph_module(X), graph_module(X))
    assert next(edit.by for edit in result.journal.edits) == "inject"
    assert [edit.by for edit in result.journal.edits][-1] == "remove"


def test_pass_that_has_nothing_to_do_modifies_nothing():
    result = passes.run(traced(), [Verify()])
    assert not result.modified


@pytest.mark.parametrize(
    ("graph_pass", "error"), [(Merge(), MergeError), (Remove(), RefusedError)], ids=["merge", "remove"]
)
def test_merge_and_remove_refuse_a_graph_without_adapter(graph_pass, error):
    with pytest.raises(error, match="no adapter"):
        passes.run(traced(), [graph_pass])


def test_injecting_twice_is_refused_and_leaves_the_graph_as_it_is():
    tuned = lora_fx.apply(traced(), rules("fc1"))
    before = str(tuned.graph)
    with pytest.raises(RefusedError, match="adapted already"):
        passes.run(tuned, [Inject(plan_for(traced()))])
    assert str(tuned.graph) == before


def test_pass_that_fails_half_way_leaves_its_input_as_it_was():
    class Fails:
        name = "fails"

        def requires(self, graph_module):
            pass

        def run(self, editor):
            editor.erase(next(node for node in editor.graph.nodes if node.op == "output"), "")
            raise RuntimeError("half way")

        def ensures(self, graph_module):
            pass

    graph_module = traced()
    before = graph_module.code
    with pytest.raises(RuntimeError, match="half way"):
        passes.run(graph_module, [Fails()])
    assert graph_module.code == before
    assert torch.equal(graph_module(X), traced()(X))


def test_merge_refuses_a_lora_subgraph_that_somebody_changed():
    tuned = lora_fx.apply(traced(), rules("fc1"))
    lora_b = next(node for node in tuned.graph.nodes if "lora_B" in str(node.target))
    with tuned.graph.inserting_after(lora_b):
        relu = tuned.graph.call_function(torch.relu, (lora_b,))
    lora_b.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
    tuned.recompile()
    with pytest.raises(MergeError) as caught:
        lora_fx.merge(tuned)
    assert caught.value.problems == (("fc1", "relu is not base + delta"),)


def test_rule_that_matches_nothing_in_a_graph_is_an_error():
    with pytest.raises(NoMatchError):
        lora_fx.apply(traced(), rules("fc3"))


# -- verify is tested to fail, invariant by invariant


def broken_shape(tuned: fx.GraphModule) -> None:
    tuned.fc1.lora_A["default"].weight = nn.Parameter(torch.zeros(3, 16))


def broken_sharing(tuned: fx.GraphModule) -> None:
    tuned.fc2.lora_B["default"].weight = tuned.fc1.lora_B["default"].weight


def broken_gradient(tuned: fx.GraphModule) -> None:
    tuned.fc1.lora_A["default"].weight.requires_grad_(False)


def broken_device(tuned: fx.GraphModule) -> None:
    tuned.fc1.lora_A["default"].to("meta")


def broken_target(tuned: fx.GraphModule) -> None:
    with tuned.graph.inserting_before(next(node for node in tuned.graph.nodes if node.op == "output")):
        tuned.graph.create_node("get_attr", "nowhere")


def broken_call(tuned: fx.GraphModule) -> None:
    node = next(node for node in tuned.graph.nodes if str(node.target) == "fc1")
    with tuned.graph.inserting_after(node):
        tuned.graph.call_module("fc1", node.args)


def broken_use(tuned: fx.GraphModule) -> None:
    node = next(node for node in tuned.graph.nodes if node.target is operator.add and node.meta["site"] == "fc1")
    node.replace_all_uses_with(node.args[0])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (broken_shape, "does not fit r=4, 16 → 32"),
        (broken_sharing, "shares a factor's parameter"),
        (broken_gradient, "do not require a gradient"),
        (broken_device, "are on cpu, meta"),
        (broken_target, "(graph)"),
        (broken_call, "2 calls in the graph, 1 of them adapted"),
        (broken_use, "the adapted output is not used"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_verify_finds_what_is_broken(spoil, told):
    tuned = lora_fx.apply(traced(), rules("**"))
    verify(tuned)
    spoil(tuned)
    with pytest.raises(InvariantError) as caught:
        verify(tuned)
    assert told in str(caught.value)


def test_every_invariant_has_a_case_above():
    assert len(INVARIANTS) == 7


@pytest.mark.parametrize("specimen", zoo.ZOO, ids=lambda specimen: specimen.name)
def test_every_adapted_model_verifies(specimen):
    for backend in ("auto", "modules"):
        verify(lora_fx.apply(specimen.build(), rules(specimen.rule), specimen.sample(), backend=backend))
