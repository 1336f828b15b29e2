"""diff: what differs between two models' graphs, grouped by site."""

from __future__ import annotations

import json

import pytest
import torch
from torch import fx, nn

import lora_fx
from tests.planning.test_plan import golden
from tests.support import zoo
from tests.support.kept import kept
from tests.support.zoo import rules


@kept
def pair(specimen: zoo.Specimen, **lora: object) -> tuple[nn.Module, nn.Module]:
    model = specimen.build()
    return model, lora_fx.apply(model, rules(specimen.rule, **lora), specimen.sample())


@pytest.mark.parametrize("specimen", zoo.ZOO, ids=lambda specimen: specimen.name)
def test_adapted_model_differs_from_its_base_at_the_adapted_sites_and_nowhere_else(specimen):
    model, tuned = pair(specimen)
    diff = lora_fx.diff(model, tuned)
    assert diff
    assert {change.path for change in diff.changes} == {site.path for site in lora_fx.inspect(tuned).sites}
    assert all(change.note == "rule 1 · r=4 scaling=4" for change in diff.changes)
    assert diff.parameters[1] - diff.parameters[0] == lora_fx.inspect(tuned).trainable


@pytest.mark.parametrize("specimen", zoo.ZOO, ids=lambda specimen: specimen.name)
def test_equal_graphs_give_an_empty_diff(specimen):
    model, tuned = pair(specimen)
    for a, b in ((model, model), (tuned, tuned), (model, lora_fx.merge(tuned)), (model, lora_fx.remove(tuned))):
        diff = lora_fx.diff(a, b)
        assert not diff
        assert str(diff).startswith("no difference")


def test_diff_is_mirrored_when_the_sides_are_swapped():
    model, tuned = pair(zoo.ZOO[1])
    there, back = lora_fx.diff(model, tuned), lora_fx.diff(tuned, model)
    assert {(c.path, c.removed, c.added) for c in there.changes} == {(c.path, c.added, c.removed) for c in back.changes}


def test_diff_as_text_shows_each_change_once_for_repeated_blocks():
    model = zoo.Encoder().eval()
    chosen = {
        "version": 1,
        "rules": [
            {"name": "attention", "match": {"name": "**.{query,value}"}, "lora": {"r": 4, "dropout": 0.1}},
            {"name": "head", "match": {"name": "classifier"}, "lora": {"r": 2}},
        ],
    }
    tuned = lora_fx.apply(model, chosen, zoo.call_encoder())
    golden("diff.txt", str(lora_fx.diff(model, tuned)))


def test_diff_of_two_ranks_names_both_sides():
    model = zoo.Gpt().eval()
    four, eight = (lora_fx.apply(model, rules("**.c_attn", r=r), (zoo.tokens(2, 6),)) for r in (4, 8))
    diff = lora_fx.diff(four, eight)
    assert len(diff.changes) == 3
    assert "* 4.0" in diff.changes[0].removed[0]
    assert "* 2.0" in diff.changes[0].added[0]


def test_diff_of_graph_modules_compares_their_own_graphs():
    torch.manual_seed(0)
    graph_module = fx.symbolic_trace(zoo.Mlp())
    tuned = lora_fx.apply(graph_module, rules("fc1"))
    (change,) = lora_fx.diff(graph_module, tuned).changes
    assert change.removed == ("fc1 = self.fc1(x)",)
    assert change.added == ("fc1 = self.fc1(x) + self.fc1.lora_B(self.fc1.lora_A(x) * 4.0)",)


def test_diff_of_exported_graphs_puts_both_sides_of_a_site_together():
    graph_module = torch.export.export(zoo.Mlp().eval(), (zoo.features(2, 3),)).module()
    tuned = lora_fx.apply(graph_module, rules("fc2"))
    (change,) = lora_fx.diff(graph_module, tuned).changes
    base = "linear_2 = linear.default(gelu, self.fc2.weight)"
    assert (change.path, change.removed) == ("fc2", (base,))
    assert change.added == (f"{base} + self.fc2.lora_B(self.fc2.lora_A(gelu) * 4.0)",)


def test_changed_layer_shows_in_the_diff_of_two_plain_models():
    a, b = zoo.Mlp(), zoo.Mlp()
    b.fc2 = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 16))
    diff = lora_fx.diff(a, b)
    assert {change.path for change in diff.changes} == {"fc2", "fc2.0", "fc2.1"}


def test_diff_as_json():
    model, tuned = pair(zoo.ZOO[0])
    document = json.loads(lora_fx.diff(model, tuned).to_json())
    assert document["schema_version"] == 1
    assert [change["path"] for change in document["changes"]] == ["fc1", "fc2"]


def test_dora_and_mixed_precision_show_in_the_diff():
    model = zoo.Mlp().to(torch.bfloat16)
    tuned = lora_fx.apply(model, rules("fc1", dora=True), (zoo.features(2, 3).to(torch.bfloat16),))
    (change,) = lora_fx.diff(model, tuned).changes
    assert "lora_magnitude_vector(" in change.added[0]
    assert ".to(base)" in change.added[0]
