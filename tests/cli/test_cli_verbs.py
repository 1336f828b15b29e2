"""The verbs of the command line: formats, widths, exit statuses, saved files, adapters on disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_fx
from lora_fx.planning.decide import decide, on_modules
from lora_fx.planning.planned import Inventory
from lora_fx.planning.sites import Site
from lora_fx.rules.reader import read_rules
from tests.cli.test_cli import imported_by
from tests.support.clitools import GOLDEN, ROOT, SMALL, golden, run, small

RULES = """\
version: 1
rules:
  - {name: qv, match: {name: "layers.*.{q,v}_proj"}, lora: {r: 2, alpha: 4}}
  - {name: head, match: {name: lm_head}, skip: "kept as it is"}
"""


@pytest.fixture
def rules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("rules.yaml")
    path.write_text(RULES)
    return path


@pytest.fixture
def plan_file(rules, tmp_path):
    path = tmp_path / "plan.json"
    assert run("plan", SMALL, rules, "--format", "json", "-o", path).exit_code == 0
    return path


@pytest.fixture
def adapter(rules, tmp_path):
    model, inputs = small()
    lora_fx.save(lora_fx.apply(model, rules, inputs), tmp_path / "adapter")
    return tmp_path / "adapter"


# -- widths


@pytest.mark.parametrize("columns", [60, 160])
def test_plan_fits_narrow_and_wide_terminals(columns, plan_file):
    golden(f"plan-{columns}.txt", run("plan", plan_file, columns=columns).stdout)


@pytest.mark.parametrize("columns", [60, 160])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("diff", ["diff", SMALL, "attention"]),
        ("explain", ["explain", SMALL, "layers.0.q_proj", "attention"]),
    ],
)
def test_output_fits_narrow_and_wide_terminals(name, words, columns):
    result = run(*words, columns=columns)
    assert result.exit_code == 0, result.output
    golden(f"{name}-{columns}.txt", result.stdout)


@pytest.mark.parametrize("columns", [60, 160])
@pytest.mark.parametrize(("name", "words"), [("help", ["--help"]), ("plan-help", ["plan", "--help"])])
def test_help_fits_narrow_and_wide_terminals(name, words, columns):
    environment = {**os.environ, "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "lora_fx", *words]
    golden(f"{name}-{columns}.txt", subprocess.run(command, env=environment, capture_output=True, text=True).stdout)


def test_no_kept_text_is_wider_than_its_terminal():
    for path in GOLDEN.glob("*.txt"):
        width = int(re.search(r"\d+", path.name)[0])
        longest = max(path.read_text(encoding="utf-8").splitlines(), key=len)
        assert len(longest) <= width or " " not in longest.strip(), f"{path.name}: {longest}"


def test_output_into_a_pipe_is_not_broken(plan_file):
    assert max(map(len, run("plan", plan_file).stdout.splitlines())) > 60


# -- colours


def test_colours_come_when_asked_for_and_never_with_no_color(plan_file):
    assert "\x1b[32m+ r=2 alpha=4\x1b[0m" in run("plan", plan_file, FORCE_COLOR="1").stdout
    assert "\x1b" not in run("plan", plan_file, FORCE_COLOR="1", NO_COLOR="1").stdout
    assert "\x1b" not in run("plan", plan_file).stdout
    assert "\x1b" not in run("plan", plan_file, "--format", "json", FORCE_COLOR="1").stdout


# -- plan


def test_saved_plan_is_shown_in_every_format_without_torch(plan_file):
    assert "torch" not in imported_by("plan", str(plan_file), "--format", "html", "-o", "-")
    whole = run("plan", plan_file).stdout
    assert run("plan", "-", stdin=plan_file.read_text()).stdout == whole
    assert json.loads(run("plan", plan_file, "--format", "json").stdout) == json.loads(plan_file.read_text())
    html = run("plan", plan_file, "--format", "html").stdout
    assert html.count("<tr data-k=") == 5
    assert not re.search(r"https?://|<script src|<link", html)
    assert run("plan", plan_file, "--stat").stdout.splitlines()[2:5] == [
        "  no rule  4 sites  kept",
        "  qv       6 sites  adapted  384 parameters",
        "  head     1 site   skipped",
    ]


def test_mermaid_and_dot_show_each_kind_of_block_once(plan_file):
    drawn = run("plan", plan_file, "--format", "mermaid").stdout
    assert '["q_proj ×3<br>Linear 16 → 16<br>+ r=2 alpha=4"]:::added' in drawn
    assert '["1 site kept<br>k_proj ×3"]:::kept' in drawn
    drawn = run("plan", plan_file, "--format", "dot").stdout
    assert drawn.startswith("digraph plan {")
    assert drawn.endswith("}\n")
    assert r'label="q_proj ×3\nLinear 16 → 16\n+ r=2 alpha=4", fillcolor="#dcf5dc"' in drawn


def test_names_cannot_break_out_of_a_picture(tmp_path):
    site = Site('a"]<script>`#', "linear", ("Linear",), (4, 4))
    hostile = on_modules(
        decide(read_rules({"version": 1, "rules": [{"match": {"name": "**"}}]}), Inventory("M", (site,), (), 16))
    )
    (tmp_path / "plan.json").write_text(hostile.to_json())
    assert '"a#quot;]#lt;script#gt;#96;#35;' in run("plan", tmp_path / "plan.json", "--format", "mermaid").stdout
    assert "a&quot;]&lt;script&gt;`#" in run("plan", tmp_path / "plan.json", "--format", "html").stdout
    assert r"a\"]" in run("plan", tmp_path / "plan.json", "--format", "dot").stdout


def test_picture_that_mermaid_would_refuse_has_a_box_for_each_rule(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4 + i, 5 + i) for i in range(600)))
    plan = lora_fx.plan(model, {"version": 1, "rules": [{"name": "all", "match": {"name": "**"}, "lora": {"r": 1}}]})
    (tmp_path / "plan.json").write_text(plan.to_json())
    drawn = run("plan", tmp_path / "plan.json", "--format", "mermaid").stdout
    assert len(drawn.splitlines()) < 10
    assert "all<br>600 sites" in drawn


def test_rules_come_from_the_standard_input_and_are_called_so(plan_file):
    result = run("plan", SMALL, "-", "--format", "json", stdin=RULES)
    assert json.loads(result.stdout)["trainable"] == json.loads(plan_file.read_text())["trainable"]
    result = run("lint", "-", stdin="version: 2\nrules: []\n")
    assert result.exit_code == 1
    assert "standard input:1:10: version must be 1" in result.stderr


def test_expected_plan_ends_with_0_and_another_with_1_and_what_differs(rules, plan_file):
    same = run("plan", SMALL, rules, "--expect", plan_file)
    assert (same.exit_code, same.stdout) == (0, f"no difference: {plan_file} and Small · {rules}, 11 sites\n")
    rules.write_text("# one line more\n" + RULES.replace("r: 2", "r: 4"))
    other = run("plan", SMALL, rules, "--expect", plan_file)
    assert other.exit_code == 1
    assert other.stdout.splitlines()[2:] == [
        "- layers.{0..2}.q_proj  ×3  Linear 16 → 16  + r=2 alpha=4",
        "+ layers.{0..2}.q_proj  ×3  Linear 16 → 16  + r=4 alpha=4",
        "- layers.{0..2}.v_proj  ×3  Linear 16 → 16  + r=2 alpha=4",
        "+ layers.{0..2}.v_proj  ×3  Linear 16 → 16  + r=4 alpha=4",
        "6 sites differ, 5 the same; trainable: 384 → 768",
    ]
    assert json.loads(run("plan", SMALL, rules, "--expect", plan_file, "--format", "json").stdout)["same"] == 5


def test_moved_lines_and_other_backends_are_no_difference(rules, plan_file):
    rules.write_text("# a comment\n\n" + RULES)
    assert run("plan", SMALL, rules, "--expect", plan_file).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", SMALL], "RULES are missing"),
        (["plan", "plan.json", "attention"], "is a saved plan, which has its rules already"),
        (["plan", SMALL, "attention", "--expect", "none.json"], "none.json: cannot be read: no such file"),
        (["pln"], "there is no verb 'pln'; did you mean plan?"),
        (["diff", "a:b", "c:d", "e:f"], "give two models, or a model and one or two rule files"),
        (["diff", "none.pt2", "attention"], "none.pt2: no such file"),
        (["plan", SMALL, "attention", "--format", "pdf"], "'pdf' is not one of"),
    ],
)
def test_trouble_ends_with_2_and_one_line(words, message):
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("lora-fx: ")
    assert len(result.stderr.splitlines()) <= 2, "at most the message and where it is explained"


def test_debug_may_stand_anywhere_and_shows_the_traceback():
    assert "Traceback" in run("plan", "nonsense", "attention", "--debug").stderr
    assert "Traceback" in run("--debug", "plan", "nonsense", "attention").stderr
    assert "Traceback" not in run("plan", "nonsense", "attention").stderr


# -- diff


def test_diff_of_a_model_before_and_after_ends_with_1_only_if_asked():
    result = run("diff", SMALL, "attention", "--stat")
    assert result.exit_code == 0
    assert sorted(line.split()[:4] for line in result.stdout.splitlines()[:2]) == [
        ["layers.{0..2}.q_proj", "×3", "-1", "+1"],
        ["layers.{0..2}.v_proj", "×3", "-1", "+1"],
    ]
    assert run("diff", SMALL, "attention", "--exit-code").exit_code == 1
    assert run("diff", SMALL, SMALL, "--exit-code").exit_code == 0


def test_diff_of_two_rule_files_on_one_model(rules):
    assert run("diff", SMALL, rules, rules, "--exit-code").exit_code == 0
    result = run("diff", SMALL, rules, "attention", "--exit-code")
    assert result.exit_code == 1
    assert "rule attention · r=8" in result.stdout


def test_diff_of_saved_graphs_and_plans_imports_no_torch(plan_file, tmp_path):
    graph = tmp_path / "graph.json"
    assert run("diff", SMALL, "-o", graph).exit_code == 0
    for file in (graph, plan_file):
        assert not imported_by("diff", str(file), str(file)) & {"torch", "numpy", "networkx"}
        assert run("diff", file, file).stdout.startswith("no difference")
    assert run("diff", graph, SMALL, "--exit-code").exit_code == 0
    assert "is a plan" in run("diff", plan_file, graph).stderr


def test_diff_of_exported_programs(tmp_path):
    model, inputs = small()
    torch.export.save(torch.export.export(model, inputs), tmp_path / "a.pt2")
    result = run("diff", tmp_path / "a.pt2", tmp_path / "a.pt2", "--exit-code", "--trust")
    assert result.exit_code == 0, result.output
    plan = run("plan", tmp_path / "a.pt2", "attention", "--trust")
    assert "6 to adapt" in plan.stdout


def test_saved_plans_are_compared_in_every_format(rules, plan_file, tmp_path):
    rules.write_text(RULES.replace("r: 2", "r: 4"))
    run("plan", SMALL, rules, "--format", "json", "-o", tmp_path / "b.json")
    shown = {form: run("diff", plan_file, tmp_path / "b.json", "--format", form).stdout for form in ("html", "mermaid")}
    assert shown["html"].count("<details data-k=") == 2
    assert ":::changed" in shown["mermaid"]
    assert run("diff", plan_file, tmp_path / "b.json", "--exit-code").exit_code == 1


# -- files of weights


def test_plan_of_a_safetensors_file_reads_names_and_shapes(tmp_path):
    model, _ = small()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    result = run("plan", tmp_path / "model.safetensors", "attention")
    assert result.exit_code == 0, result.output
    assert "6 to adapt, 5 to keep" in result.stdout
    assert "Embedding 32 → 16" in result.stdout
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(model.state_dict(), "model.safetensors")})
    )
    assert run("plan", tmp_path / "model.safetensors.index.json", "attention").stdout == result.stdout


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            {"weight_map": {"a": "../model.safetensors"}},
            "'../model.safetensors', which is not a safetensors file beside it",
        ),
        ({"weight_map": {"a": "/tmp/model.safetensors"}}, "which is not a safetensors file beside it"),
        ({"weight_map": {"a": "inner.index.json"}}, "which is not a safetensors file beside it"),
        ({"weight_map": {"a": ["model.safetensors"]}}, "no name, which is not"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "is no JSON object"),
    ],
)
def test_an_index_names_files_beside_it_and_no_others(tmp_path, index, words):
    save_file(small()[0].state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    result = run("plan", tmp_path / "in" / "model.safetensors.index.json", "attention")
    assert result.exit_code == 2
    assert words in result.stderr


# -- doctor, completion, speed


def test_doctor_runs_a_small_model_through_everything():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert [line.split()[-0] for line in result.stdout.splitlines() if " works " in line] == [
        "capture", "train", "save,", "merge",
    ]  # fmt: skip
    assert result.stdout.splitlines()[-1] == "all is well"


def test_doctor_tells_what_fails_and_ends_with_1(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no tracing today")

    monkeypatch.setattr(lora_fx.api, "apply", broken)
    monkeypatch.setattr(lora_fx, "apply", broken, raising=False)
    result = run("doctor", "--format", "json")
    assert result.exit_code == 1
    checks = json.loads(result.stdout)["checks"]
    assert checks[0] == {"name": "capture", "passed": False, "detail": "RuntimeError: no tracing today"}


def test_quick_doctor_imports_no_torch():
    assert "torch" not in imported_by("doctor", "--quick")


@pytest.mark.parametrize(("words", "position", "offered"), [("pl", 1, "plan"), ("lint att", 2, "attention")])
def test_shells_complete_verbs_and_shipped_rules(words, position, offered):
    environment = {"_LORA_FX_COMPLETE": "bash_complete", "COMP_WORDS": f"lora-fx {words}", "COMP_CWORD": str(position)}
    script = "from lora_fx.cli import main; main(prog_name='lora-fx')"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT
    )
    assert f"plain,{offered}" in done.stdout.splitlines()
