"""What diff can be given: models with and without graphs, GraphModules, exported programs, files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.graphdiff.graphs import Graph
from tests.support import zoo
from tests.support.zoo import rules


def encoder(**lora: object) -> tuple[nn.Module, nn.Module]:
    model = zoo.Encoder().eval()
    return model, lora_fx.apply(model, rules("**.{query,value}", **lora), zoo.call_encoder())


def test_two_rule_files_on_one_model_differ_in_their_sites_and_ranks():
    model = zoo.Encoder().eval()
    one = lora_fx.apply(model, rules("**.query", r=4, alpha=8), zoo.call_encoder())
    other = lora_fx.apply(model, rules("**.{query,value}", r=8, alpha=16), zoo.call_encoder())
    diff = lora_fx.diff(one, other)
    assert {c.path.split(".")[-1]: c.note for c in diff.changes} == {
        "query": "rule 1 · r=4 scaling=2 → rule 1 · r=8 scaling=2",
        "value": "rule 1 · r=8 scaling=2",
    }
    shown = next(c for c in diff.changes if c.path.endswith("query"))
    assert shown.removed[0].endswith("* 2.0)  # lora_A weight float32 [4, 16], lora_B weight float32 [16, 4]")
    assert shown.added[0].endswith("* 2.0)  # lora_A weight float32 [8, 16], lora_B weight float32 [16, 8]")


def test_costs_of_an_adapter_are_its_parameters_bytes_and_operations():
    model, tuned = encoder(r=4)
    diff = lora_fx.diff(model, tuned)
    change = diff.changes[0]
    assert change.parameters == (16 * 16 + 16, 16 * 16 + 16 + 2 * 4 * 16)
    assert change.bytes == (4 * 272, 4 * 400)
    assert change.flops == (2 * 16 * 16, 2 * 16 * 16 + 2 * 2 * 4 * 16)
    assert diff.parameters[1] - diff.parameters[0] == 6 * 128
    assert diff.flops[1] - diff.flops[0] == 6 * 256


def test_an_adapted_model_without_graphs_is_compared_where_inputs_are_given_too():
    model = zoo.Encoder().eval()
    tuned = lora_fx.apply(model, rules("**.{query,value}", r=4), zoo.call_encoder(), backend="modules")
    diff = lora_fx.diff(model, tuned, zoo.call_encoder())
    assert len(diff.changes) == 6
    assert {change.note for change in diff.changes} == {"rule 1 · r=4 scaling=4"}
    assert lora_fx.graph(tuned, zoo.call_encoder()).parameters == sum(p.numel() for p in tuned.parameters())


def test_an_adapted_model_loses_its_adapters_when_it_is_merged():
    _, tuned = encoder()
    diff = lora_fx.diff(tuned, lora_fx.merge(tuned))
    assert {c.note for c in diff.changes} == {"without rule 1 · r=4 scaling=4"}
    assert all("lora" in c.removed[0] and "lora" not in c.added[0] for c in diff.changes)


def test_plain_models_are_compared_statement_by_statement_where_inputs_are_given():
    class Other(zoo.Encoder):
        pass

    a, b = zoo.Encoder().eval(), Other().eval()
    for layer in b.layer:
        layer.norm1 = nn.Identity()
    diff = lora_fx.diff(a, b, zoo.call_encoder())
    assert str(diff).splitlines()[2:5] == [
        "@@ layer.{0..2}.norm1 ×3 · each -32 parameters, -128 B @@",
        "-    norm1 = self.norm1(add_2)  # LayerNorm",
        "+    norm1 = self.norm1(add_2)  # Identity",
    ]
    assert len(diff.changes) == 3


def test_plain_models_without_inputs_are_compared_module_by_module():
    a, b = zoo.Encoder(), zoo.Encoder(width=32)
    diff = lora_fx.diff(a, b)
    assert "weight float32 [16, 16]" in str(diff)
    assert "weight float32 [32, 32]" in str(diff)


def test_models_stay_in_their_modes():
    model, tuned = encoder()
    model.train()
    lora_fx.diff(model, tuned)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in tuned.modules())


def test_names_of_nodes_do_not_count():
    graph_module = fx.symbolic_trace(zoo.Mlp())
    renamed = fx.symbolic_trace(graph_module)
    for node in renamed.graph.nodes:
        if node.op not in ("placeholder", "output"):
            node._rename(f"temporary_{len(node.name)}")
    renamed.recompile()
    assert [n.name for n in renamed.graph.nodes] != [n.name for n in graph_module.graph.nodes]
    assert not lora_fx.diff(graph_module, renamed)


def test_two_exported_programs_and_their_files(tmp_path):
    model, inputs = zoo.Mlp().eval(), (zoo.features(2, 3),)
    tuned = lora_fx.apply(model, rules("fc1"), inputs)
    programs = [torch.export.export(either, inputs) for either in (model, tuned)]
    for program, name in zip(programs, ("a.pt2", "b.pt2")):
        torch.export.save(program, tmp_path / name)
    diff = lora_fx.diff(*programs)
    assert {c.path for c in diff.changes} >= {"fc1"}
    assert diff.parameters[1] - diff.parameters[0] == 4 * (16 + 32)
    files = lora_fx.diff(tmp_path / "a.pt2", tmp_path / "b.pt2", trust=True)
    assert (files.a, files.b) == ("a.pt2", "b.pt2")
    assert files.changes == diff.changes
    assert not lora_fx.diff(programs[0], tmp_path / "a.pt2", trust=True)


class Harmless:
    """No plain tensor: torch unpickles it, and would make it."""

    made = 0

    def __reduce__(self):
        return Harmless.make, ()

    @staticmethod
    def make():
        Harmless.made += 1
        return torch.zeros(2)


def test_a_program_is_read_by_those_who_trust_it_only(tmp_path):
    """What is in a .pt2 file runs when torch reads it: the example inputs are a pickle."""
    model, inputs = zoo.Mlp().eval(), (zoo.features(2, 3),)
    program = torch.export.export(model, inputs)
    program.example_inputs = ((Harmless(),), {})
    torch.export.save(program, tmp_path / "a.pt2")
    for read in (lambda: lora_fx.graph(tmp_path / "a.pt2"), lambda: lora_fx.diff(model, str(tmp_path / "a.pt2"))):
        with pytest.raises(LoraFxError, match=r"a\.pt2: is a program, and reading it can run any code") as caught:
            read()
        assert "trust=True" in str(caught.value)
    assert Harmless.made == 0


def test_a_file_that_is_no_program_is_an_error_of_ours(tmp_path):
    (tmp_path / "broken.pt2").write_bytes(b"nothing")
    with pytest.raises(LoraFxError, match=r"broken\.pt2: cannot be read"):
        lora_fx.graph(tmp_path / "broken.pt2", trust=True)
    with pytest.raises(LoraFxError, match="missing"):
        lora_fx.graph(tmp_path / "missing.json")


def test_saved_graphs_are_compared_and_drawn_without_torch(tmp_path):
    model, tuned = encoder()
    inputs = zoo.call_encoder()
    lora_fx.graph(model, inputs).save(tmp_path / "a.json")
    lora_fx.graph(tuned).save(tmp_path / "b.json")
    code = (
        "import sys; from lora_fx.graphdiff.graphs import Graph; from lora_fx.graphdiff.diff import compare\n"
        "diff = compare(*map(Graph.load, sys.argv[1:])); diff.to_json(), diff.to_html(), diff.to_svg(), diff.to_mermaid()\n"
        "assert 'torch' not in sys.modules; print(diff)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(lora_fx.diff(tmp_path / "a.json", tmp_path / "b.json"))
    assert "layer.{0..2}.attention.query ×3" in printed


def test_a_graph_knows_sizes_rules_and_what_flows_where():
    _, tuned = encoder()
    graph = lora_fx.graph(tuned)
    (query,) = [node for node in graph.nodes if node.path == "layer.1.attention.query"]
    assert query.rule == "rule 1 · r=4 scaling=4"
    assert query.value.startswith("float32 [")
    assert query.value.endswith(", 16]")
    assert graph.nodes[query.inputs[0]].name == "hidden"
    assert graph.weights["layer.1.attention.query.lora_A.default.weight"].shape == (4, 16)


def test_identical_blocks_are_captured_once(monkeypatch):
    from lora_fx.graphdiff import models

    model = zoo.Encoder(layers=6).eval()
    tuned = lora_fx.apply(model, rules("**.query"), zoo.call_encoder())
    captured = []
    capture = models.capture
    monkeypatch.setattr(models, "capture", lambda *a, **k: captured.append(1) or capture(*a, **k))
    assert len(lora_fx.diff(model, tuned).changes) == 6
    assert len(captured) <= 2


def test_a_block_that_holds_another_value_is_captured_for_itself():
    model = zoo.Encoder(layers=3).eval()
    model.layer[1].attention.heads = 2
    tuned = lora_fx.apply(model, rules("**.query"), zoo.call_encoder())
    diff = lora_fx.diff(model, tuned)
    views = [n.code for n in diff.comparison.a.nodes if n.op == ".view" and n.path == "layer.1.attention"]
    assert all(", 2, " in code for code in views)
    assert len(diff.changes) == 3


def test_graph_is_data():
    assert isinstance(lora_fx.graph(zoo.Mlp()), Graph)


def test_whether_a_base_is_frozen_or_in_train_mode_is_no_difference():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    tuned = lora_fx.apply(model, rules("**.{linear1,linear2}"), (torch.randn(2, 5, 8),))
    diff = lora_fx.diff(model, tuned)
    assert {c.path.split(".")[-1] for c in diff.changes} == {"linear1", "linear2"}
    assert len(diff.changes) == 4
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("region", [zoo.call_encoder(), None], ids=["blocks", "modules"])
def test_adapters_beside_each_other_are_each_shown(region):
    model, tuned = encoder(r=4)
    lora_fx.add(tuned, rules("**.{query,value}", r=2, adapter="other"))
    diff = lora_fx.diff(model, tuned, region)
    changes = {change.path: "\n".join(change.added) for change in diff.changes}
    assert len(changes) == 6
    for layer in range(3):
        both = changes[f"layer.{layer}.attention.query"]
        assert "query.lora_B.default(query.lora_A.default(x)" in both
        assert "query.lora_B.other(query.lora_A.other(x)" in both
    assert not lora_fx.diff(tuned, tuned, region)


def test_an_adapter_that_code_cannot_name_is_shown():
    model, tuned = encoder(adapter="train")
    diff = lora_fx.diff(model, tuned, zoo.call_encoder())
    assert len(diff.changes) == 6
    assert all("lora_A" in "\n".join(change.added) for change in diff.changes)
