"""Plans and graphs from JSON: held to their types and to the model; one that was changed is never applied."""

from __future__ import annotations

import json

import pytest

import lora_fx
from lora_fx.errors import LoraFxError, StalePlanError
from lora_fx.graphdiff.graphs import Graph, GraphFileError
from lora_fx.planning.reading import PlanFileError
from tests.support import zoo

CHOSEN = {
    "version": 1,
    "rules": [
        {"name": "fused", "match": {"name": "**.c_attn"}, "lora": {"r": 2}, "slices": {"of": ["q", "k", "v"], "adapt": ["q"]}},
        {"name": "wide", "match": {"name": "**.c_fc"}, "lora": {"r": 3, "alpha": 6}},
        {"name": "head", "match": {"name": "lm_head"}, "skip": "tied"},
    ],
    "train": ["ln_f"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return zoo.Gpt()


@pytest.fixture(scope="module")
def saved(model) -> str:
    return lora_fx.plan(model, CHOSEN).to_json()


def changed(text: str, where: tuple, value: object) -> str:
    """Return a document with another value at a place; with nothing there if the value is `...`."""
    document = json.loads(text)
    *steps, last = where
    inner = document
    for step in steps:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(document)


def position(text: str, path: str) -> int:
    return next(at for at, site in enumerate(json.loads(text)["sites"]) if site["path"] == path)


FC, ATTENTION = "h.0.c_fc", "h.0.c_attn"
NO_PLAN = [
    (("schema_version",), True, "schema version 1"),
    (("sites",), {}, "plan.sites must be a list, found an object"),
    (("sites", 0), "a", r"plan.sites\[0\] must be an object, found 'a'"),
    (("sites", FC, "shape"), [], "no shape of a weight"),
    (("sites", FC, "shape"), [2**62, 2], "no shape of a weight"),
    (("sites", FC, "shape", 0), 2**63, r"shape\[0\] must be a whole number from 0 to 2\*\*63 - 1, found a number of 64 bits"),
    (("sites", FC, "shape", 0), -1, r"shape\[0\] must be a whole number"),
    (("sites", FC, "shape", 0), True, r"shape\[0\] must be a whole number"),
    (("sites", FC, "shape", 0), 16.0, r"shape\[0\] must be a whole number"),
    (("sites", FC, "classes"), [], "has no class"),
    (("sites", FC, "op"), "other", "does 'other' with its weight"),
    (("sites", FC, "layout"), "other", "layout must be one of out_in, in_out"),
    (("sites", FC, "backend"), "gpu", "backend must be one of graph, module"),
    (("sites", FC, "path"), 3, "path must be a text"),
    (("sites", FC, "path"), ..., "site lacks 'path'"),
    (("sites", FC, "size"), 3, "has the key 'size', which is unknown here"),
    (("sites", FC, "lora", "r"), 0, "r must be at least 1, found 0"),
    (("sites", FC, "lora", "r"), 2**40, "r must be at most 65536"),
    (("sites", FC, "lora", "alpha"), 1e308, "alpha must be a finite number"),
    (("sites", FC, "lora", "alpha"), 10**400, "alpha must be a finite number, found a number of 1329 bits"),
    (("sites", FC, "lora", "alpha"), "8", "alpha must be a finite number, found '8'"),
    (("sites", FC, "lora", "dropout"), 1.5, "dropout must be at least 0 and below 1"),
    (("sites", FC, "lora", "init"), "other", "init 'other' is unknown"),
    (("sites", FC, "lora", "adapter"), "../a", "adapter '../a' must be a name"),
    (("sites", FC, "lora", "share"), "A", "not decided of a bank"),
    (("sites", FC, "lora", "divide_r"), 2, "not decided of a bank"),
    (("sites", FC, "lora", "divide_r"), "experts", "divide_r must be a whole number"),
    (("sites", FC, "lora"), None, "adapt without an adapter"),
    (("sites", FC, "decision"), "skip", "skip with an adapter"),
    (("sites", FC, "decision"), "do", "decision must be one of"),
    (("sites", FC, "per_call"), True, "each of an unknown number of calls"),
    (("sites", FC, "passes"), ["rm"], "a pass that is unknown"),
    (("sites", ATTENTION, "slices", "adapt"), ["x"], "'x' is not a part"),
    (("sites", ATTENTION, "slices", "parts", 1, "name"), "q", "a part stands there twice"),
    (("sites", ATTENTION, "slices", "parts", 0, "size"), 4, "rows of 'k'"),
    (("sites", ATTENTION, "slices", "parts", 0, "rows"), [[0, 2**40]], "rows of 'k'|up to"),
    (("sites", 1, "path"), "wte", "two have one path"),
    (("train", 0, "parameters"), "16", "parameters must be a whole number"),
    (("regions",), None, "plan.regions must be a list"),
    (("notes",), [1], r"plan.notes\[0\] must be a text"),
    (("total",), float("nan"), "total must be a whole number"),
    (("trainable",), 1, "parameters to train"),
    (("capture",), "code", None),
    (("unknown",), 1, "has the key 'unknown'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "value", "words"), NO_PLAN, ids=[f"{'.'.join(map(str, w[0]))}={str(w[1])[:9]}" for w in NO_PLAN]
)
def test_what_no_plan_can_say_is_refused_with_its_place(saved, where, value, words):
    if len(where) > 1 and where[0] == "sites" and isinstance(where[1], str):
        where = ("sites", position(saved, where[1]), *where[2:])
    text = changed(saved, where, value)
    if words is None:
        assert lora_fx.Plan.from_json(text) == lora_fx.Plan.from_json(saved)
        return
    with pytest.raises(PlanFileError, match=words) as caught:
        lora_fx.Plan.from_json(text)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 500


OTHER_FACTS = [
    ("bias", False, "bias True", "bias False"),
    ("aliases", ["x"], "aliases ('x',)", "aliases ()"),
    ("tied_to", ["lm_head.weight"], "tied_to ('lm_head.weight',)", "tied_to ()"),
    ("refusal", "because", "refusal 'because'", "refusal None"),
    ("parameter", "h.0.c_fc.bias", "parameter 'h.0.c_fc.bias'", "parameter ''"),
    ("layout", "in_out", "layout 'in_out'", "layout 'out_in'"),
    ("read", True, "read True", "read False"),
    ("classes", ["Linear"], "classes ('Linear',)", "classes ('Linear', 'torch.nn.modules.linear.Linear')"),
]  # fmt: skip


@pytest.mark.parametrize(("fact", "value", "told", "there"), OTHER_FACTS, ids=[fact[0] for fact in OTHER_FACTS])
def test_a_plan_that_says_of_a_site_what_the_model_does_not_is_refused_with_the_facts(
    model, saved, fact, value, told, there
):
    document = json.loads(saved)
    site = document["sites"][position(saved, FC)]
    told, there = (told, there) if fact != "bias" else (f"bias {not site['bias']}", f"bias {site['bias']}")
    site[fact] = not site["bias"] if fact == "bias" else value
    plan = lora_fx.Plan.from_json(json.dumps(document))
    with pytest.raises(StalePlanError) as caught:
        lora_fx.apply(model, plan)
    path, planned, actual = caught.value.differences[0]
    assert path == FC
    assert planned.startswith(told[:60])
    assert actual.startswith(there[:60])


def with_trainable(document: dict) -> str:
    """Return the text with the sum that its sites have, as whoever changes a plan would write it."""
    for _ in range(2):
        try:
            lora_fx.Plan.from_json(json.dumps(document))
            break
        except PlanFileError as error:
            document["trainable"] = int(str(error).split(" have ")[1].split()[0].replace(",", ""))
    return json.dumps(document)


def rank(document, site):
    site["lora"]["r"] = 30


def scaling(document, site):
    site["lora"]["alpha"] = 600.0


def elsewhere(document, site):
    site |= {"decision": "keep", "lora": None, "rule": None, "reason": "no rule"}


def other_part(document, site):
    document["sites"][position(json.dumps(document), ATTENTION)]["slices"]["adapt"] = ["k"]


def other_rule(document, site):
    site["rule"] = "fused"


def not_trained(document, site):
    document["train"] = []


def fingerprint(document, site):
    document["fingerprint"] = "0" * 16


def total(document, site):
    document["total"] += 1


@pytest.mark.parametrize("change", [rank, scaling, elsewhere, other_part, other_rule, not_trained, fingerprint, total])
def test_a_plan_that_says_what_its_rules_do_not_is_refused(model, saved, change):
    document = json.loads(saved)
    change(document, document["sites"][position(saved, FC)])
    plan = lora_fx.Plan.from_json(with_trainable(document))
    with pytest.raises(StalePlanError) as caught:
        lora_fx.apply(model, plan, backend="modules")
    assert caught.value.differences


def test_a_plan_without_its_rules_is_not_applied(model, saved):
    plan = lora_fx.Plan.from_json(changed(saved, ("rules",), {}))
    with pytest.raises(LoraFxError):
        lora_fx.apply(model, plan, backend="modules")


def test_a_plan_that_was_not_changed_is_applied(model, saved):
    tuned = lora_fx.apply(model, lora_fx.Plan.from_json(saved), backend="modules")
    assert len(lora_fx.inspect(tuned).sites) == 6


GRAPH = lora_fx.graph(zoo.Mlp()).to_json()
NO_GRAPH = [
    (("kind",), "a", "no kind that says so"),
    (("schema_version",), 2, "schema version 1"),
    (("nodes",), {}, "graph.nodes must be a list"),
    (("nodes", 0, "op"), 3, r"graph.nodes\[0\].op must be a text"),
    (("nodes", 0, "other"), 3, "has the key 'other'"),
    (("nodes", 0, "flops"), -1, "flops must be a whole number"),
    (("nodes", 1, "inputs"), [99], "an input that is not an earlier node"),
    (("nodes", 1, "code"), "$" + "9" * 5000, "refers to an input that it has not"),
    (("nodes", 1, "weights"), ["x"], "reads x, which is not described"),
    (("weights",), [], "graph.weights must be an object"),
    (("weights", "x"), [[2**62, 2], "float32"], "no shape or no dtype"),
    (("weights", "x"), [[2], "9" * 5000], "no shape or no dtype"),
    (("weights", "x"), [[2]], "must be an object, found a list"),
    (("weights", "x"), [[10**400], "float32"], "found a number of 1329 bits"),
    (("parameters",), 1.5, "parameters must be a whole number"),
    (("name",), ..., "lacks 'name'"),
]


@pytest.mark.parametrize(("where", "value", "words"), NO_GRAPH, ids=[".".join(map(str, w[0])) for w in NO_GRAPH])
def test_what_no_graph_can_say_is_refused_with_its_place(where, value, words):
    assert Graph.from_json(GRAPH).to_json() == GRAPH
    with pytest.raises(GraphFileError, match=words) as caught:
        Graph.from_json(changed(GRAPH, where, value))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("read", [lora_fx.Plan.from_json, Graph.from_json])
@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": 1, "a": 2}', r'"\ud800"', "", "{", "[]", "null"])
def test_text_that_is_no_json_object_is_an_error_of_ours(read, text):
    with pytest.raises((PlanFileError, GraphFileError), match="that lora_fx has saved"):
        read(text)


def test_a_graph_file_must_be_a_file(tmp_path):
    with pytest.raises(GraphFileError, match="is a directory, not a file"):
        Graph.load(tmp_path)
