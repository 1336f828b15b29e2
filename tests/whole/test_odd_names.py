"""Names come from others.  Whatever they hold, no output has a control character, and no line more than with plain ones."""

import copy
import json
import random
import unicodedata
import warnings
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError, LoraFxWarning, RuleError
from lora_fx.graphdiff.graphs import Graph
from lora_fx.planning.diff import plan_diff
from lora_fx.planning.explain import UnknownPathError
from lora_fx.planning.render.tree import diff_tree, plan_tree, tree_dot, tree_mermaid
from tests.support.clitools import run

HIDDEN = ["\x1b[2J", "\x1b]0;title\x07", "\0", "\r", "\n", "\t", "\x7f", "\x85", "\x9b31m", "\b", "\u200b", "\u202e", "\u2028",
          "\u2066", "\ufeff", "\U000e0041"]  # fmt: skip
SEEN = [
    *"ab01_-",
    " ",
    '"',
    "'",
    "\\",
    "<",
    ">",
    "&",
    "#",
    "`",
    "$",
    "{",
    "}",
    "[",
    "]",
    "|",
    ";",
    "%",
    "é",
    "漢",
    "ﬁ",
    "</script>",
]
RULES = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 1}}]}


def odd_names(number: int, seed: int = 0) -> list[str]:
    """Return different names, each with characters that are not seen and others that some format reads as its own."""
    draw = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < number:
        parts = [draw.choice(HIDDEN), *(draw.choice((*HIDDEN, *SEEN)) for _ in range(draw.randint(0, 5)))]
        draw.shuffle(parts)
        names["".join(parts)] = None
    return list(names)


def hidden_in(text: str) -> set[str]:
    """Return the characters of a text that are not seen but do something, line breaks apart."""
    return {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


class Layers(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    def forward(self, x, gain=None):  # an optional argument: no tracing without inputs
        for layer in self.layers.values():
            x = layer(x)
        return x


def plain(number: int) -> list[str]:
    return [f"n{chr(97 + k % 26)}x{chr(97 + k // 26 % 26)}y{chr(97 + k // 676)}" for k in range(number)]


def every_text(names: list[str], folder) -> dict[str, str]:
    """Return all that can be shown of a model with modules of these names, by what it is."""
    model = Layers(names).requires_grad_(False)
    torch.manual_seed(0)
    plan = lora_fx.plan(model, RULES)
    other = lora_fx.plan(model, {**RULES, "rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]})
    tuned = lora_fx.apply(model, RULES, backend="modules")
    for parameter in lora_fx.parameters(tuned):
        nn.init.normal_(parameter)
    lora_fx.save(tuned, folder)
    deltas, changed = lora_fx.deltas(tuned), plan_diff(plan, other)
    return {
        "plan": str(plan),
        "whole plan": plan.text(fold=False),
        "narrow plan": plan.text(width=60),
        "plan.stat": plan.stat(),
        "plan.html": plan.to_html(),
        "plan.mermaid": tree_mermaid(plan_tree(plan)),
        "plan.dot": tree_dot(plan_tree(plan)),
        "plan.json": plan.to_json(),
        "plan diff": str(changed),
        "plan diff.html": changed.to_html(),
        "plan diff.json": changed.to_json(),
        "plan diff.mermaid": tree_mermaid(diff_tree(changed)),
        "plan diff.dot": tree_dot(diff_tree(changed)),
        "inspect": str(lora_fx.inspect(tuned)),
        "inspect.json": lora_fx.inspect(tuned).to_json(),
        "deltas": str(deltas),
        "deltas.json": deltas.to_json(),
        "deltas.svg": deltas.to_svg(),
        "deltas.html": deltas.to_html(),
        "explain": str(lora_fx.explain(model, f"layers.{names[0]}", RULES)),
        "saved": run("inspect", str(folder)).output,
        "saved.json": run("inspect", str(folder), "--format", "json").output,
    }


def diff_texts(names: list[str]) -> dict[str, str]:
    """Return all forms of the difference between a model's graph and the adapted one's, and of a graph."""
    model, x = Layers(names), torch.randn(3, 2)
    tuned = lora_fx.apply(model, RULES, example_inputs=(x,))
    diff, graph = lora_fx.diff(model, tuned, (x,)), lora_fx.graph(model, (x,))
    assert Graph.from_json(graph.to_json()) == graph
    return {
        "diff": str(diff),
        "diff.json": diff.to_json(),
        "diff.html": diff.to_html(),
        "diff.svg": diff.to_svg(),
        "diff.mermaid": diff.to_mermaid(),
        "diff.dot": diff.to_dot(),
        "diff.graphml": diff.to_graphml(),
        "graph.json": graph.to_json(),
    }


def _check(texts: dict[str, str], as_plain: dict[str, str]) -> None:
    wrong = {what: hidden_in(text) for what, text in texts.items() if hidden_in(text)}
    assert not wrong
    for what, text in texts.items():
        if what.endswith(".json"):
            json.loads(text)
        elif what.endswith((".svg", ".graphml")):
            ElementTree.fromstring(text)
    lines = {what: (text.count("\n"), as_plain[what].count("\n")) for what, text in texts.items()}
    assert {what: pair for what, pair in lines.items() if pair[0] != pair[1] and what != "narrow plan"} == {}


def test_check_finds_every_character_that_is_not_seen():
    assert [len(hidden_in(f"a{text}b")) > 0 for text in HIDDEN if text != "\n"] == [True] * (len(HIDDEN) - 1)
    assert not hidden_in("".join(SEEN) + "\n")


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_form_of_a_plan_or_report_shows_anything_of_odd_names_that_is_not_seen(number, tmp_path):
    _check(every_text(odd_names(number), tmp_path / "odd"), every_text(plain(number), tmp_path / "plain"))


def test_no_form_of_a_diff_or_graph_shows_anything_of_odd_names_that_is_not_seen():
    _check(diff_texts(odd_names(16)), diff_texts(plain(16)))


def test_adapters_of_odd_names_are_saved_and_loaded_bit_by_bit(tmp_path):
    model = Layers(odd_names(60))
    tuned = lora_fx.apply(model, RULES, backend="modules")
    for parameter in lora_fx.parameters(tuned):
        nn.init.normal_(parameter)
    lora_fx.save(tuned, tmp_path / "adapter")
    loaded = lora_fx.load(model, tmp_path / "adapter")
    mine, theirs = tuned.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(lora_fx.inspect(loaded).sites) == 60


@pytest.mark.parametrize("target", ["save", "merged", "kohya", "vllm", "peft"])
def test_names_with_half_a_character_are_refused_before_anything_is_written(tmp_path, target):
    tuned = lora_fx.apply(Layers(["a\ud800", "b"]), RULES, backend="modules")
    path = tmp_path / ("k.safetensors" if target == "kohya" else "a")
    with pytest.raises(lora_fx.RefusedError, match="no file can hold; nothing was written"):
        lora_fx.save(tuned, path) if target == "save" else lora_fx.export(tuned, path, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HIDDEN, ids=ascii)
def test_errors_and_warnings_show_odd_names_and_keep_them_in_their_fields(name):
    path = f"layers.a{name}b"
    with pytest.raises(LoraFxError) as refused:
        raise lora_fx.RefusedError(f"{path} is refused", [(path, "why")])
    assert not hidden_in(str(refused.value)) - {"\t"}
    assert refused.value.refusals == ((path, "why"),)
    with pytest.warns(LoraFxWarning) as warned:
        warnings.warn(f"{path} is odd", LoraFxWarning, stacklevel=1)
    assert not hidden_in(str(warned[0].message)) - {"\t"}


def test_caret_stands_under_what_is_meant_behind_characters_that_are_written_out(tmp_path):
    (tmp_path / "rules.yaml").write_text("version: 1\nrules:\n  - {name: 'a\u2067b', nmae: 1}\n", encoding="utf-8")
    with pytest.raises(RuleError) as refused:
        lora_fx.plan(Layers(["a"]), tmp_path / "rules.yaml")
    *_, source, marked = [line for line in str(refused.value).splitlines() if "|" in line]
    assert source[marked.index("^") :].startswith("nmae")


@pytest.mark.parametrize("name", ["a[b", "a]", "a{b", "a*b", "a\\", "a?", "a}b", "re:("])
def test_names_with_the_signs_of_patterns_are_explained_and_extracted_as_names(name):
    model = Layers([name, "axb"])
    assert "adapt by" in lora_fx.explain(model, f"layers.{name}", RULES)
    with pytest.raises(UnknownPathError, match="nothing called"):
        lora_fx.explain(model, f"nowhere.{name}", RULES)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[name].weight.add_(1)
    assert [site.path for site in lora_fx.inspect(lora_fx.extract(other, model, r=1)).sites] == [f"layers.{name}"]


def test_rule_named_with_what_is_not_seen_heads_a_diff_in_one_line():
    model = nn.Sequential(nn.Linear(2, 2))
    rules = [{"name": "\x1b]0;t\x07\nb", "match": {"name": "**"}, "lora": {"r": 1}}]
    text = str(lora_fx.diff(model, lora_fx.apply(model, {"version": 1, "rules": rules})))
    assert "\\x1b]0;t\\x07\\nb" in text
    assert hidden_in(text) <= {"\n"}


def test_what_the_command_line_says_of_names_classes_and_folders_is_seen(tmp_path):
    torch.manual_seed(0)
    odd = tmp_path / "\x1b]0;t\x07"
    model = nn.Sequential(nn.Linear(2, 2))
    lora_fx.save(lora_fx.apply(model, RULES), tmp_path / "adapter")
    lora_fx.export(lora_fx.apply(model, RULES), tmp_path / "base", "merged")
    factory = tmp_path / "factory.py"
    factory.write_text(f"from torch import nn\nmade = type({odd.name!r}, (nn.Sequential,), {{}})(nn.Linear(2, 2))\n")
    calls = [
        (odd.name,), ("plan", "--" + odd.name), ("bench", "a:b", "attention", "--tokens", odd.name),
        ("inspect", str(tmp_path / "adapter"), f"{factory}:made"), ("merge", str(tmp_path / "base"),
        str(tmp_path / "adapter"), "-o", str(odd)),
    ]  # fmt: skip
    for call in calls:
        output = run(*call).output
        assert "\\x1b]0;t\\x07" in output
        assert hidden_in(output) <= {"\n"}
