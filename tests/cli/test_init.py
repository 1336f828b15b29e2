"""`lora-fx init`: a first rule file, written whole and over nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import lora_fx
from tests.support.clitools import ROOT, SMALL, run, small


def test_file_is_written_and_planned_with(tmp_path):
    path = tmp_path / "rules.yaml"
    done = run("init", SMALL, "-o", path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{path} is written; see what it does: lora-fx plan {SMALL} {path}\n"
    assert path.read_text(encoding="utf-8") == lora_fx.draft_rules(*small())
    assert run("lint", path).stdout == f"{path}: 1 rule, no problem\n"
    assert run("plan", SMALL, path).exit_code == 0


def test_without_a_file_the_rules_go_to_the_standard_output():
    done = run("init", SMALL, columns=40)
    assert done.stdout == lora_fx.draft_rules(*small())


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_what_is_there_is_overwritten_with_force_only(kind, tmp_path):
    path, target = tmp_path / "rules.yaml", tmp_path / "target.yaml"
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(target)
        (target.write_text("mine") if kind == "link" else None)
    refused = run("init", "no_such_module:f", "-o", path)  # before the model is looked for
    assert refused.exit_code == 2
    assert f"{path} is there already; --force overwrites it" in refused.stderr
    assert kind == "broken link" or path.read_text() == "mine"
    assert run("init", SMALL, "-o", path, "--force").exit_code == 0
    assert path.read_text(encoding="utf-8").startswith("## Rules for Small")
    assert path.is_symlink() == (kind != "file")


def test_directory_is_no_file(tmp_path):
    refused = run("init", SMALL, "-o", tmp_path, "--force")
    assert (refused.exit_code, "is no regular file" in refused.stderr) == (2, True)


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    failed = run("init", SMALL, "-o", tmp_path / "rules.yaml")
    assert (failed.exit_code, "No space left" in failed.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


def test_model_that_cannot_be_adapted_writes_nothing(tmp_path):
    (tmp_path / "m.py").write_text("import torch\ndef f(): return torch.nn.LayerNorm(3)\n")
    done = run("init", f"{tmp_path / 'm.py'}:f", "-o", tmp_path / "rules.yaml")
    assert (done.exit_code, (tmp_path / "rules.yaml").exists()) == (2, False)


def test_every_kind_of_model_gets_rules(tmp_path):
    import transformers

    transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ).save_pretrained(tmp_path / "bert")
    model, inputs = small()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.export.save(torch.export.export(model, inputs), tmp_path / "model.pt2")
    for spec, more in ((f"hf:{tmp_path / 'bert'}", []), (tmp_path / "model.safetensors", []),
                       (tmp_path / "model.pt2", ["--trust"])):  # fmt: skip
        path = tmp_path / "rules.yaml"
        done = run("init", spec, "-o", path, "--force", *more)
        assert done.exit_code == 0, done.output
        planned = run("plan", spec, path, *more)
        assert planned.exit_code == 0, planned.output
        assert " 0 refused" in planned.stdout


def test_help_imports_no_torch():
    code = "import sys\nfrom lora_fx.cli import main\nmain(['init', '--help'], standalone_mode=False)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_with_a_task_the_recipe_is_written_with_its_sources(tmp_path):
    path = tmp_path / "rules.yaml"
    done = run("init", SMALL, "--task", "instruction", "-o", path)
    assert (done.exit_code, done.stderr) == (0, "")
    text = path.read_text(encoding="utf-8")
    assert text == lora_fx.recipe(small()[0], "instruction", small()[1]).to_yaml()
    assert "10 times 2e-05, the usual rate" in text
    assert run("lint", path).stdout == f"{path}: 1 rule, no problem\n"
    wrong = run("init", "no_such_module:f", "--task", "poetry")
    assert (wrong.exit_code, "no recipe for 'poetry'" in wrong.stderr) == (2, True)


def weighted() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return small()


WEIGHTED = "tests.cli.test_init:weighted"


def test_allocate_writes_rules_under_a_budget(tmp_path):
    path = tmp_path / "rules.yaml"
    done = run("allocate", WEIGHTED, "all-linear", "--mean-r", 4, "-o", path)
    assert (done.exit_code, done.stderr) == (0, "")
    model, inputs = weighted()
    expected = lora_fx.allocate(model.eval(), "all-linear", inputs, mean_r=4)
    assert path.read_text(encoding="utf-8") == expected.to_yaml()
    assert run("plan", SMALL, path).exit_code == 0
    again = run("allocate", WEIGHTED, "all-linear", "--mean-r", 4, "-o", path)
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    assert run("allocate", WEIGHTED, "all-linear", "--mean-r", 4).stdout == expected.to_yaml()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--budget", 10), 2, "below rank 1 at each of"),
        (("--budget", 10, "--mean-r", 3), 2, "two ways to say one thing"),
        (("--most", 0), 2, "most is 0"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(words, status, message):
    done = run("allocate", WEIGHTED, "all-linear", *words)
    assert (done.exit_code, message in done.stderr) == (status, True)
