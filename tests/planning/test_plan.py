"""plan: every site, what will happen to it and why; nothing is changed, and no weights are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import NoMatchError
from lora_fx.planning.decide import decide
from lora_fx.planning.rows import fold_rows, row_of
from lora_fx.rules.reader import read_rules
from tests.support import zoo
from tests.support.textbook import GPT, gpt2_classifier, gpt3
from tests.support.zoo import rules

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str, text: str) -> None:
    """Compare with a golden file, which was read and found right by a person."""
    path = GOLDEN / name
    if not path.exists():
        path.write_text(text + "\n", encoding="utf-8")
        pytest.fail(f"{name} was written: read it, then run again")
    assert text + "\n" == path.read_text(encoding="utf-8")


CHOSEN = {
    "version": 1,
    "defaults": {"r": 4, "alpha": 8},
    "rules": [
        {"name": "attention", "match": {"name": "**.c_attn"}, "lora": {"r": 2, "dropout": 0.1}, "expect": 3},
        {"name": "wide", "match": {"shape": ["4*d", "d"], "op": "linear"}},
        {"name": "head", "match": {"name": "lm_head"}, "skip": "tied to the token embedding"},
        {"name": "absent", "match": {"name": "**.q_proj"}, "expect": "any"},
        {"name": "again", "match": {"name": "h.0.c_{attn,fc}"}},
    ],
    "train": ["ln_f"],
}


def test_plan_as_text():
    plan = lora_fx.plan(zoo.Gpt(), CHOSEN, (zoo.tokens(2, 6),))
    golden("plan.txt", str(plan))


def test_plan_as_text_without_folding_has_a_line_for_each_site():
    plan = lora_fx.plan(zoo.Gpt(), CHOSEN, (zoo.tokens(2, 6),))
    lines = plan.text(fold=False).splitlines()
    assert sum("Linear" in line or "Embedding" in line for line in lines) == len(plan.sites) == 15


def test_every_site_has_a_decision_and_a_reason():
    plan = lora_fx.plan(zoo.Gpt(), CHOSEN, (zoo.tokens(2, 6),))
    decisions = {site.path: (site.decision, site.reason, site.rule) for site in plan.sites}
    assert decisions["h.0.c_attn"] == ("adapt", "attention", "attention")
    assert decisions["h.1.c_fc"] == ("adapt", "wide", "wide")
    assert decisions["h.1.c_proj"] == ("keep", "no rule", None)
    assert decisions["lm_head"] == ("skip", "tied to the token embedding", "head")
    assert plan.unmatched_rules == ("absent", "again")
    assert "rule 'again' also matches 2 sites decided before it by 'attention', 'wide'" in plan.notes


def test_first_matching_rule_wins():
    two = {
        "version": 1,
        "rules": [{"match": {"name": "fc1"}, "lora": {"r": 1}}, {"match": {"name": "**"}, "lora": {"r": 2}}],
    }
    plan = lora_fx.plan(zoo.Mlp(), two)
    assert {site.path: site.lora.r for site in plan.adapted} == {"fc1": 1, "fc2": 2}


def test_sites_stand_in_model_order_with_shape_calls_and_backend():
    plan = lora_fx.plan(zoo.Shared(), rules("**"), (zoo.features(2, 3),))
    assert [(site.path, site.op, site.shape, site.calls, site.backend) for site in plan.sites] == [
        ("a", "linear", (16, 16), 2, "graph"),
        ("c", "linear", (16, 16), 1, "graph"),
    ]
    assert plan.sites[0].site.aliases == ("b",)


def test_rule_matches_a_shared_module_by_any_of_its_names():
    assert [site.path for site in lora_fx.plan(zoo.Shared(), rules("b")).adapted] == ["a"]


def test_tied_weights_are_named():
    (*_, head) = lora_fx.plan(zoo.Gpt(), rules("lm_head")).sites
    assert head.site.tied_to == ("wte.weight",)


def test_counts_are_those_of_the_adapted_model():
    model = zoo.Encoder()
    plan = lora_fx.plan(model, rules("**.query", train=["classifier"], r=3, bias=True, dora=True))
    tuned = lora_fx.apply(model, plan, backend="modules")
    assert plan.trainable == sum(p.numel() for p in lora_fx.parameters(tuned))
    assert plan.trainable == 3 * (3 * (16 + 16) + 16 + 16) + 16 * 5 + 5
    assert plan.total == sum(p.numel() for p in model.parameters())


def test_sites_of_modules_trained_whole_are_left_to_them():
    plan = lora_fx.plan(zoo.Encoder(), rules("**", train=["classifier"]))
    (site,) = (site for site in plan.sites if site.path == "classifier")
    assert (site.decision, site.reason) == ("train", "under train: classifier")
    kept = len(plan.sites) - len(plan.adapted) - 1
    assert plan.sums.startswith(f"{len(plan.adapted)} to adapt, 1 to train whole, {kept} to keep, 0 refused.")
    assert row_of(site)[3:] == ("+ trained whole", "", "under train: classifier")
    assert "  under train: classifier  1 site    trained" in plan.stat().splitlines()


# -- rules that do not hold


@pytest.mark.parametrize("function", [lora_fx.plan, lora_fx.apply])
def test_what_is_no_model_is_an_error(function):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, found dict"):
        function({"no": "model"}, rules("**"))


def test_every_rule_that_matches_nothing_is_named_at_once():
    chosen = {
        "version": 1,
        "rules": [
            {"name": "good", "match": {"name": "**.query"}},
            {"name": "bad", "match": {"name": "**.qeury"}},
            {"name": "few", "match": {"name": "**.key"}, "expect": 7},
            {"name": "shape", "match": {"shape": [1000, "*"]}},
        ],
    }
    with pytest.raises(NoMatchError) as caught:
        lora_fx.plan(zoo.Encoder(), chosen)
    numbers = {missed.rule: (missed.found, missed.expected) for missed in caught.value.unmatched}
    assert numbers == {"bad": (0, "at least one"), "few": (3, "exactly 7"), "shape": (0, "at least one")}
    golden("no_match.txt", str(caught.value))


def test_what_matches_nothing_is_shown_where_it_stands_rules_and_train_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'version: 1\nrules:\n  - name: bad\n    match: {name: "**.qeury"}\n'
        '  - match: {op: linear, shape: [7, 7]}\ntrain: ["clasifier"]\n'
    )
    with pytest.raises(NoMatchError) as caught:
        lora_fx.plan(zoo.Encoder(layers=1), path)
    assert str(caught.value).replace(str(path), "mine.yaml").splitlines() == [
        "mine.yaml:6:9: train matched none of the modules",
        '    6 | train: ["clasifier"]',
        "      |         ^^^^^^^^^^^",
        "  pattern  clasifier",
        "  nearest  classifier",
        "  fix the pattern, or take it away",
        "mine.yaml:4:19: rule 'bad' matched none of 9 sites",
        '    4 |     match: {name: "**.qeury"}',
        "      |                   ^^^^^^^^^^",
        "  pattern  **.qeury",
        "  nearest  layer.0.attention.query",
        "  fix the pattern, or set `expect: any` if a model need not have it",
        "mine.yaml:5:17: rule 'rule 2' matched none of 9 sites",
        "    5 |   - match: {op: linear, shape: [7, 7]}",
        "      |                 ^^^^^^",
        "  pattern  shape=[7, 7] op=linear",
        "  fix the pattern, or set `expect: any` if a model need not have it",
    ]


def test_rule_whose_name_fits_says_which_other_condition_does_not():
    chosen = {"version": 1, "rules": [{"match": {"name": "**.c_attn", "shape": ["d", "d"]}}]}
    with pytest.raises(NoMatchError) as caught:
        lora_fx.plan(zoo.Gpt(), chosen)
    assert caught.value.unmatched[0].almost == "h.0.c_attn, but shape: in = 16 is not d = 48"
    assert str(caught.value).splitlines()[1:3] == [
        "  pattern  name=**.c_attn shape=[d, d]",
        "  almost   h.0.c_attn, but shape: in = 16 is not d = 48",
    ]


def test_rule_for_what_is_trained_whole_is_shown_and_no_error():
    chosen = rules("**.query", train=["classifier"])
    chosen["rules"].append({"name": "head", "match": {"name": "classifier"}})
    plan = lora_fx.plan(zoo.Encoder(), chosen)
    assert plan.unmatched_rules == ("head",)
    assert plan.notes[0] == "rule 'head' matches only what is trained whole"


def test_rank_above_the_smaller_side_is_noted_once_for_all_sites_of_a_rule():
    notes = lora_fx.plan(zoo.Encoder(layers=4), rules("**.query", r=64)).notes
    assert notes[0] == (
        "layer.0.attention.query, layer.1.attention.query, layer.2.attention.query … and 1 more: "
        "r = 64 is above min(in, out) = 16; full fine-tuning would need fewer parameters"
    )


def test_zero_may_be_expected():
    chosen = rules("**.query")
    chosen["rules"].append({"match": {"name": "**.q_proj"}, "expect": 0})
    assert lora_fx.plan(zoo.Encoder(), chosen).unmatched_rules == ("rule 2",)


# -- JSON


def test_plan_survives_json():
    plan = lora_fx.plan(zoo.Gpt(), CHOSEN, (zoo.tokens(2, 6),))
    again = lora_fx.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert json.loads(plan.to_json())["schema_version"] == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": 9}', '{"schema_version": 1, "sites": ["a"]}'])
def test_text_that_is_no_plan_is_an_error(text):
    with pytest.raises(ValueError, match="plan"):
        lora_fx.Plan.from_json(text)


def test_fingerprint_depends_on_structure_and_not_on_values_or_dtype():
    prints = [lora_fx.plan(model, rules("**")).fingerprint for model in (zoo.Mlp(), zoo.Mlp().double(), zoo.Mlp(32))]
    assert prints[0] == prints[1] != prints[2]


# -- the meta device, and the counts of the literature


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


def test_gpt2_with_all_linears_at_rank_16_has_the_textbooks_count():
    plan = lora_fx.plan(on_meta(gpt2_classifier), rules("**", r=16, alpha=16))
    assert plan.trainable == 2_666_528


def test_gpt3_has_the_papers_counts():
    model = on_meta(gpt3)
    for r, count in ((1, 4_718_592), (8, 37_748_736)):
        plan = lora_fx.plan(model, rules("**.W_{query,value}", r=r))
        assert plan.trainable == count
        assert round(plan.total / 1e9) == 175


def test_roberta_has_the_papers_count():
    import transformers

    config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    model = on_meta(lambda: transformers.RobertaForSequenceClassification(config))
    plan = lora_fx.plan(model, rules("**.{query,value}", r=8))
    assert plan.trainable == 294_912


def test_plan_on_meta_finds_graphs_like_a_plan_with_values():
    model = on_meta(lambda: GPT(3, 16, 4, 50, 32, 50))
    plan = lora_fx.plan(model, rules("**.W_query"), (zoo.tokens(2, 6),))
    assert {site.backend for site in plan.adapted} == {"graph"}


def test_model_adapted_on_meta_gets_values_later_and_is_proven_then():
    model = on_meta(lambda: GPT(2, 16, 4, 50, 32, 50))
    tuned = lora_fx.apply(model, rules("**.W_query"), (zoo.tokens(2, 6),))
    tuned.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.normal_(std=0.1)
        expected = lora_fx.merge(tuned)(zoo.tokens(2, 6))
        for _ in range(3):
            torch.testing.assert_close(tuned(zoo.tokens(2, 6)), expected, rtol=1e-4, atol=1e-5)
    region = lora_fx.inspect(tuned).regions[0]
    assert region.hits == 2


def test_plan_without_inputs_traces_straight_line_blocks_symbolically():
    plan = lora_fx.plan(zoo.Mixer(), rules("**"))
    assert {site.path: site.backend for site in plan.sites}["blocks.0.token1"] == "graph"
    branching = lora_fx.plan(zoo.Encoder(), rules("**.query"))
    assert {site.backend for site in branching.adapted} == {"module"}
    assert any("example_inputs" in note for note in branching.notes)


def test_model_of_transformers_is_planned_with_its_own_dummy_inputs():
    import transformers

    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    plan = lora_fx.plan(transformers.BertModel(config), "attention")
    assert [(site.path, site.backend) for site in plan.adapted] == [
        (f"encoder.layer.{i}.attention.self.{name}", "graph") for i in range(2) for name in ("query", "value")
    ]


# -- folding


def test_repeated_blocks_are_folded_only_where_they_are_alike():
    rows = [("a.0.b", "x"), ("a.1.b", "x"), ("a.2.b", "y"), ("c", "x"), ("d.0.e.1", "x"), ("d.0.e.2", "x")]
    assert fold_rows(rows) == [("a.{0..1}.b  ×2", "x"), ("a.2.b", "y"), ("c", "x"), ("d.0.e.{1..2}  ×2", "x")]


def test_gaps_in_the_numbers_are_not_folded_away():
    assert fold_rows([("a.0", "x"), ("a.2", "x")]) == [("a.0", "x"), ("a.2", "x")]


def test_decide_needs_no_model():
    from lora_fx.planning.planned import Inventory
    from lora_fx.planning.sites import Site

    inventory = Inventory("Any", (Site("a", "linear", ("Linear",), (4, 8)),), (("", 32), ("a", 32)), 32)
    assert decide(read_rules(rules("a", r=2)), inventory).trainable == 2 * 12
