"""The command line: what it prints, how it ends, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lora_fx.cli import main

ROOT = Path(__file__).parents[2]


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "def plain(): return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 8))\n"
        "def with_inputs(): return plain(), (torch.zeros(2, 16),)\n"
        "def nothing(): return 3\n"
    )
    return path


@pytest.fixture
def rule_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('version: 1\nrules:\n  - match: {name: "**"}\n    lora: {r: 2}\n')
    return path


def imported_by(*words: str) -> set[str]:
    """Return the modules that a command has imported when it ends."""
    code = (
        "import sys\nfrom lora_fx.cli import main\n"
        f"try: main({list(words)!r}, standalone_mode=False)\nexcept SystemExit: pass\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("words", [("lint", "attention"), ("--help",), ("plan", "--help"), ("schema",)])
def test_lint_help_and_schema_import_no_torch(words):
    modules = imported_by(*words)
    assert "lora_fx.cli" in modules
    assert not modules & {"torch", "numpy", "networkx", "safetensors"}


def test_help_imports_click_and_of_ours_only_the_verbs_and_what_they_show():
    """What a shell waits for is what is imported: counted here, as seconds are another machine's."""
    modules = imported_by("--help")
    foreign = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"__main__", "_distutils_hack"}
    assert foreign == {"lora_fx", "click"}
    ours = {name.split(".")[1] for name in modules if name.startswith("lora_fx.")}
    assert ours == {"cli", "errors", "sources", "text"}
    assert len(modules) < 200


def test_lint_imports_no_more_than_help_and_the_rules():
    more = imported_by("lint", "attention") - imported_by("--help")
    assert {name.split(".")[0] for name in more if "cython" not in name} <= {
        "lora_fx",
        "yaml",
        *sys.stdlib_module_names,
    }
    assert {name.split(".")[1] for name in more if name.startswith("lora_fx.")} <= {"rules", "sources"}


def test_misspelt_rule_file_is_reported_before_torch_is_imported():
    assert "torch" not in imported_by("plan", "any:thing", "atention")


def test_importing_lora_fx_imports_no_torch():
    code = "import sys, lora_fx; assert 'torch' not in sys.modules; lora_fx.plan; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_lint_of_good_files_ends_with_0():
    result = run("lint", "attention", "all-linear", str(ROOT / "demo" / "rules.yaml"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "attention: 1 rule, no problem"


def test_lint_of_bad_files_ends_with_1_and_names_every_problem_of_every_file(tmp_path):
    (tmp_path / "a.yaml").write_text("version: 2\nrules: []\n")
    result = run("lint", str(tmp_path / "a.yaml"), "attention", str(tmp_path / "none.yaml"))
    assert result.exit_code == 1
    assert f"{tmp_path / 'a.yaml'}:1:10: version must be 1" in result.stderr
    assert f"{tmp_path / 'a.yaml'}:2:8: rules is an empty list" in result.stderr
    assert "none.yaml: no such file" in result.stderr
    assert "attention: 1 rule, no problem" in result.stdout


def test_lint_warns_of_rules_that_never_decide(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        'version: 1\nrules:\n  - {name: a, match: {name: "**"}}\n  - {name: b, match: {name: x}}\n'
        "  - {name: c, match: {name: x}}\n"
    )
    result = run("lint", str(path))
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"warning: {path}:4: rule 'b' stands after 'a', which matches everything",
        f"warning: {path}:5: rule 'c' has the match of rule 'b' and never decides a site",
    ]


@pytest.mark.parametrize("factory", ["plain", "with_inputs"])
def test_plan_of_a_factory_in_a_file(model_file, rule_file, factory):
    result = run("plan", f"{model_file}:{factory}", str(rule_file))
    assert result.exit_code == 0, result.output
    assert "2 to adapt, 0 to keep, 0 refused.  Trainable: 80 of 208 parameters (38 %)." in result.stdout


def test_file_may_import_what_lies_beside_it_and_bear_the_name_of_a_module(tmp_path, rule_file):
    (tmp_path / "beside_it.py").write_text(
        "import torch\ndef make(): return torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
    )
    (tmp_path / "json.py").write_text("from beside_it import make\n")
    result = run("plan", f"{tmp_path / 'json.py'}:make", str(rule_file), "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trainable"] == 16


def test_plan_as_json_into_a_file(model_file, rule_file, tmp_path):
    result = run("plan", f"{model_file}:plain", str(rule_file), "--format", "json", "-o", str(tmp_path / "plan.json"))
    assert result.exit_code == 0
    assert json.loads((tmp_path / "plan.json").read_text())["trainable"] == 80


def test_plan_of_a_factory_in_a_package():
    result = run("plan", "tests.support.textbook:gpt2_classifier", "all-linear", "--all")
    assert result.exit_code == 0, result.output
    assert "trf_blocks.11.att.W_query" in result.stdout


def test_plan_of_a_transformers_directory_needs_the_configuration_only(tmp_path):
    import transformers

    transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ).save_pretrained(tmp_path)
    result = run("plan", f"hf:{tmp_path}", "attention")
    assert result.exit_code == 0, result.output
    assert "4 of 4 adapted sites in graphs" in result.stdout


def test_rule_that_matches_nothing_ends_with_1(model_file):
    result = run("plan", f"{model_file}:plain", "attention")
    assert result.exit_code == 1
    assert result.stderr.startswith("lora-fx: attention:10:11: rule 'attention' matched none of 2 sites")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "'nonsense' is not a model: write package.module:factory, file.py:factory, hf:DIRECTORY"),
        (":f", "':f' is not a model: write package.module:factory"),
        ("org/name", "did you mean hf:org/name?"),
        ("models.py", "name the function in it that makes the model: models.py:NAME"),
        ("nowhere.at.all:f", "there is no module 'nowhere.at.all'"),
        ("missing.py:f", "missing.py: no such file"),
        ("hf:./nowhere", "nowhere/config.json does not exist"),
        ("hf:nowhere", "nowhere is no directory here, and"),
        ("tests.support.textbook:nothing", "tests.support.textbook has no 'nothing'; it has"),
        ("FILE:nothing", "gives an object of type int, not a torch.nn.Module"),
    ],
)
def test_model_that_is_none_ends_with_2_and_says_why(spec, message, model_file):
    result = run("plan", spec.replace("FILE", str(model_file)), "attention")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_error_of_the_users_code_is_one_line_and_debug_shows_the_traceback(tmp_path):
    (tmp_path / "bad.py").write_text("def f(): raise ValueError('my own\\nmistake')\n")
    short = run("plan", f"{tmp_path / 'bad.py'}:f", "attention")
    assert (short.exit_code, short.stderr) == (2, "lora-fx: ValueError: my own\n")
    assert "Traceback" in run("--debug", "plan", f"{tmp_path / 'bad.py'}:f", "attention").stderr


@pytest.mark.parametrize(
    "words", [("help",), ("help", "RuleError"), ("help", "ruleerror"), ("help", "errors#ruleerror")]
)
def test_errors_are_explained_offline(words):
    told = run(*words)
    assert told.exit_code == 0
    assert "RuleError" in told.stdout
    assert ("    RuleError: 2 problems in mine.yaml" in told.stdout) == (len(words) == 2)


def test_error_ends_with_the_command_that_explains_it(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    told = run("plan", str(tmp_path / "plan.json"))
    assert told.exit_code == 2, told.exception
    *_, last = told.stderr.splitlines()
    program, *words = last.partition("see: ")[2].split()
    assert program == "lora-fx"
    assert run(*words).stdout.startswith(f"{words[1]}\n\n")


def test_help_of_a_verb_is_its_own_and_an_unknown_name_gets_what_is_near():
    assert run("help", "lint").stdout == run("lint", "--help").stdout
    wrong = run("help", "RuelError")
    assert (wrong.exit_code, "did you mean RuleError" in wrong.stderr) == (2, True)


def test_explanations_are_plain_text():
    from lora_fx.cli.help import plain, sections

    assert plain("See [Rules](rules.md).\n\n```python\nx = 1\n```\n") == "See Rules.\n\n    x = 1"
    assert not [text for text in sections().values() if "```" in text or "](" in text]


def test_schema_is_the_shipped_one():
    assert run("schema").stdout == (ROOT / "rules" / "lora-fx.schema.json").read_text()


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert run("--version").stdout.strip() == f"lora-fx, version {version('lora-fx')}"
