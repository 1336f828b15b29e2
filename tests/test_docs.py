"""Every code block of the documentation runs and prints what the page says that it prints."""

from __future__ import annotations

import re

import pytest

from tests.docpages import PAGES, ROOT, blocks_of, differences, with_keys

IDS = [str(path.relative_to(ROOT)) for path in PAGES]


@pytest.mark.parametrize("path", PAGES, ids=IDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_runs_and_prints_what_the_page_shows(path):
    wrong = [(block.text, right) for block, right in differences(path.read_text(encoding="utf-8"))]
    assert wrong == [], "python -m tests.docpages brings the pages up to date"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_tables_of_keys_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert with_keys(text) == text


def test_a_wrong_output_is_found():
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    assert [(block.text, right) for block, right in differences(page)] == [("3\n", "2\n")]


def test_every_rule_key_is_in_the_documentation_with_an_example():
    text = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    for table in ("TOP", "RULE", "MATCH", "LORA", "SLICES"):
        assert f"<!-- keys: {table} -->" in text


def test_yaml_examples_of_the_rules_page_are_rule_files(tmp_path):
    from lora_fx.rules import read_rules

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
