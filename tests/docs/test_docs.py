"""Every code block of the documentation runs and prints what the page says that it prints."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import sys

import pytest
import torch

import lora_fx
from lora_fx.errors import LoraFxError, RuleError
from tests.support.clitools import run
from tests.support.docpages import PAGES, ROOT, blocks_of, differences, with_keys
from tests.support.pictures import FOLDER, pictures

IDS = [str(path.relative_to(ROOT)) for path in PAGES]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in ("tutorial", "recipes") else path for path in PAGES],
    ids=IDS,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks transformers for it
def test_code_runs_and_prints_what_the_page_shows(path):
    text = path.read_text(encoding="utf-8")
    for name in sorted(imported_in(text)):
        pytest.importorskip(name)
    wrong = [(block.text, right) for block, right in differences(text) if not is_same(block.text, right)]
    assert wrong == [], "python -m tests.support.docpages brings the pages up to date"


def is_same(shown: str, printed: str) -> bool:
    """Whether they are equal; with another torch than the pinned one, which counts other operations, but for numbers."""
    if f"torch=={torch.__version__.partition('+')[0]}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8"):
        return shown == printed
    return re.sub(r"\d+", "0", shown) == re.sub(r"\d+", "0", printed)


def imported_in(text: str) -> set[str]:
    """Return the packages of other people that the code of a page imports at its start."""
    code = "\n".join(block.text for block in blocks_of(text) if block.language == "python")
    names = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    return set(names) - {"lora_fx", "demo", "torch", "networkx", "yaml", *sys.stdlib_module_names}


def test_imports_of_a_page_are_found():
    page = "```python\nimport torch, json\nfrom diffusers import UNet2DConditionModel\nimport peft\n```\n"
    assert imported_in(page) == {"diffusers", "peft"}


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_tables_of_keys_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    if "<!-- rows of PEFT -->" in text:
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    assert with_keys(text) == text


def test_a_wrong_output_is_found():
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    assert [(block.text, right) for block, right in differences(page)] == [("3\n", "2\n")]


def test_every_rule_key_is_in_the_documentation_with_an_example():
    text = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    for table in ("TOP", "RULE", "MATCH", "LORA", "SLICES"):
        assert f"<!-- keys: {table} -->" in text


def test_yaml_examples_of_the_rules_page_are_rule_files(tmp_path):
    from lora_fx.rules.reader import read_rules

    pages = [
        block for path in PAGES for block in blocks_of(path.read_text(encoding="utf-8")) if block.language == "yaml"
    ]
    assert pages
    for number, block in enumerate(pages):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block.text, encoding="utf-8")
        read_rules(path)


def test_version_stands_in_the_changelog():
    from importlib.metadata import version

    assert re.search(
        rf"^## {re.escape(version('lora-fx'))}", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_every_error_has_a_heading_that_messages_link_to():
    for module in ("cli.saved", "graphdiff.graphs", "graphdiff.programs", "cli.models.spec", "training.lines"):
        importlib.import_module(f"lora_fx.{module}")
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    headings = {f"errors#{line[3:].lower()}" for line in page.splitlines() if line.startswith("## ")}
    missing = [kind.__name__ for kind in errors_of(LoraFxError) if f"errors#{kind.__name__.lower()}" not in headings]
    assert missing == []
    assert RuleError("rules", []).__notes__ == ["  see: lora-fx help RuleError"]


def errors_of(kind: type[LoraFxError]) -> list[type[LoraFxError]]:
    ours = [subclass for subclass in kind.__subclasses__() if subclass.__module__.startswith("lora_fx.")]
    return [kind, *(error for sub in ours for error in errors_of(sub))]


def test_newcomer_has_an_adapted_model_of_their_own_after_eight_lines():
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    first = next(block for block in blocks_of(tutorial) if block.language == "python")
    assert "lora_fx.apply(model" in first.text
    assert len([line for line in first.text.splitlines() if line]) <= 8


def test_all_of_lora_fx_and_the_reference_have_all_of_it():
    told = (ROOT / "docs" / "all-of-lora-fx.md").read_text(encoding="utf-8")
    listed = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    functions = [name for name in lora_fx.__all__ if name.islower()]
    assert [name for name in functions if f"lora_fx.{name}(" not in told] == []
    names = [name for name in lora_fx.__all__ if not name.endswith(("Error", "Warning"))]
    assert [name for name in names if f"::: lora_fx.{name}\n" not in listed] == []


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_code_of_a_page_is_at_most_88_columns_wide_and_imports_nothing_internal(path):
    blocks = [
        block for block in blocks_of(path.read_text(encoding="utf-8")) if block.language not in ("text", "console")
    ]
    assert [line for block in blocks for line in block.text.splitlines() if len(line) > 88] == []
    code = "\n".join(block.text for block in blocks if block.language == "python")
    imported = set(re.findall(r"^from (lora_fx[\w.]*) import", code, re.MULTILINE))
    parts = {"lora_fx.integrations.lightning", "lora_fx.integrations.trainer"}
    assert imported <= {"lora_fx", "lora_fx.bench", "lora_fx.passes"} | parts


def test_page_for_users_of_peft_has_every_key_and_method_of_it():
    peft = pytest.importorskip("peft")
    told = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "coming-from-peft.md").read_text(encoding="utf-8")))
    keys = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    methods = {name for name in set(dir(peft.PeftModel)) - set(dir(torch.nn.Module)) if not name.startswith("_")}
    assert sorted((keys | methods) - told) == []


def test_peft_passes_over_a_name_that_matches_nothing_and_we_do_not():
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    assert peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(lora_fx.NoMatchError, match="v_proj"):
        lora_fx.plan(model, target=["q_proj", "v_proj"])


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def test_hook_for_pre_commit_runs_a_verb_that_is_there():
    import yaml

    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["entry"].split() == ["lora-fx", "lint"]
    assert run("lint", ROOT / "demo" / "rules.yaml").exit_code == 0


def test_figures_show_what_the_code_does():
    wrong = [name for name, text in pictures().items() if (FOLDER / name).read_text(encoding="utf-8") != text]
    assert wrong == [], "python -m tests.support.pictures brings the figures up to date"
