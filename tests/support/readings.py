"""One reading each of changed rules, plans and graphs: read and used, or refused by an error of ours in bounded words."""

from __future__ import annotations

import functools
import io
import json
import random

import lora_fx
from lora_fx.errors import LoraFxError, NoMatchError, RefusedError, RuleError, StalePlanError
from lora_fx.graphdiff.diff import compare
from lora_fx.graphdiff.graphs import Graph, GraphFileError
from lora_fx.planning.decide import decide, still_fitting
from lora_fx.planning.diff import plan_diff
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import EmbeddingTable, Inventory, PlannedSite
from lora_fx.planning.reading import PlanFileError
from lora_fx.planning.sites import Site
from lora_fx.rules.lint import lint
from lora_fx.rules.reader import read_rules, read_stream
from tests.support.mutation import EXTRA, mutated_document, mutated_text, seeds_of_rules

LONGEST_ERROR = 200_000
_LINEAR = ("Linear", "torch.nn.modules.linear.Linear")
SITES = tuple(
    Site(f"h.{layer}.{name}", "linear", _LINEAR, shape, bias=True)
    for layer in range(2)
    for name, shape in (("q_proj", (8, 8)), ("v_proj", (8, 8)), ("fc", (32, 8)))
)
INVENTORY = Inventory(
    "Small",
    (Site("wte", "embedding", ("Embedding",), (50, 8)), *SITES),
    (("h", 1000), ("head", 80)),
    1000,
    tables=(EmbeddingTable(("wte",), "wte.weight", 50, 8, ("head.weight",), padding=1),),
    biases=(("h.0.q_proj.bias", 8), ("head.bias", 50)),
)
CHOSEN = {
    "version": 1,
    "rules": [
        {"name": "q", "match": {"name": "**.q_proj"}, "lora": {"r": 2}, "slices": {"of": ["a", "b"], "adapt": ["b"]}},
        {"name": "rest", "match": {"op": "linear"}, "lora": {"r": 4, "alpha": 2.5, "bias": True}},
        {"name": "skipped", "match": {"name": "wte"}, "skip": "because"},
    ],
    "train": ["head"],
}  # fmt: skip


def bounded(error: LoraFxError) -> None:
    """Hold an error to its bounds: in words, and in problems where it lists them."""
    assert 0 < len(str(error)) < LONGEST_ERROR
    assert not isinstance(error, RuleError) or 0 < len(error.problems) <= 200


def of_rules(content: bytes) -> bool:
    """Whether rules are read; those that are mean the same as a dict, and are linted and decide without trouble."""
    try:
        rules = read_stream(io.BytesIO(content), "fuzz")
    except RuleError as error:
        bounded(error)
        return False
    lint(rules)
    assert read_rules(rules.to_dict()).to_dict() == rules.to_dict()
    try:
        str(Plan.of(decide(rules, INVENTORY)))
    except (NoMatchError, RefusedError) as error:
        bounded(error)
    return True


@functools.cache
def _seeds() -> list[str]:
    return seeds_of_rules()


def rules_case(seed: int) -> bool:
    return of_rules(mutated_text(random.Random(seed), _seeds()))


def _done(planned: PlannedSite) -> tuple[object, ...]:
    return (planned.path, planned.decision, planned.rule, planned.lora, planned.slices, planned.per_call)


@functools.cache
def _plan() -> tuple[Plan, object, str]:
    plan = Plan.of(decide(read_rules(CHOSEN), INVENTORY))
    return plan, json.loads(plan.to_json()), plan.to_json()


def plan_case(seed: int) -> bool:
    original, document, text = _plan()
    return of_plan(mutated_document(random.Random(seed), document, text), original)


def of_plan(text: str, original: Plan) -> bool:
    """Whether a plan is read; one that is can be shown, and is applied only where it decides what the original does."""
    try:
        plan = Plan.from_json(text)
    except PlanFileError as error:
        bounded(error)
        return False
    assert Plan.from_json(plan.to_json()) == plan
    assert str(plan)
    assert plan.stat()
    str(plan_diff(original, plan))
    try:
        decided = still_fitting(plan, INVENTORY)
    except (StalePlanError, RuleError, RefusedError) as error:
        bounded(error)
        return True
    if plan.rules == original.rules:
        assert sorted(map(_done, decided.sites), key=str) == sorted(map(_done, original.sites), key=str)
        assert [site.site for site in decided.sites if site.site.dtype == "float32"]
        assert decided.trainable == original.trainable
    return True


@functools.cache
def _graph() -> tuple[Graph, object, str]:
    from tests.support import zoo

    graph = lora_fx.graph(zoo.Mlp())
    return graph, json.loads(graph.to_json()), graph.to_json()


def graph_case(seed: int) -> bool:
    original, document, text = _graph()
    return of_graph(mutated_document(random.Random(seed), document, text), original)


def of_graph(text: str, original: Graph) -> bool:
    """Whether a graph is read; one that is can be written, and compared with the original."""
    try:
        graph = Graph.from_json(text)
    except GraphFileError as error:
        bounded(error)
        return False
    assert Graph.from_json(graph.to_json()) == graph
    diff = compare(original, graph)
    assert str(diff)
    assert diff.to_json()
    return True


def any_text(content: bytes) -> None:
    """Read the same bytes as rules, as a plan and as a graph; what a coverage-guided fuzzer is let loose on."""
    of_rules(content)
    text = content.decode("utf-8", "replace")
    for read in (Plan.from_json, Graph.from_json):
        try:
            read(text)
        except LoraFxError as error:
            bounded(error)


def texts() -> dict[str, str]:
    """Return a valid text of each kind, by name."""
    return {"rules": EXTRA, "plan": _plan()[2], "graph": _graph()[2]}
