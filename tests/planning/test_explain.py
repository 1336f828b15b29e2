"""`explain` says of one site why it is adapted or not."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from torch import nn

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.planning.explain import UnknownPathError
from tests.support import zoo

RULES = {
    "version": 1,
    "rules": [
        {"name": "wide", "match": {"op": "linear", "shape": [">=48", "*"]}, "lora": {"r": 2}},
        {"name": "head", "match": {"name": "lm_head"}, "skip": "tied to the embedding"},
        {"name": "rest", "match": {"name": "h.**"}, "lora": {"r": 4}},
    ],
}


def explained(path: str, model: object = None, **more: object) -> str:
    return lora_fx.explain(model or zoo.Gpt(), path, RULES, (zoo.tokens(2, 6),), **more)


def test_adapted_site_is_told_with_what_each_rule_says_of_it():
    assert explained("h.0.c_proj").splitlines() == [
        "h.0.c_proj",
        "  weight  Linear 16 → 16, linear, float32",
        "  used    1 time in a forward with the example inputs",
        "",
        "  adapt by rest: r=4 scaling=4, 128 parameters; backend graph",
        "  contraction: factored below 512 tokens, merged from there on",
        "  in training: fuse; no stack (no other adapted layer multiplies its input); no recompute (making its input again "
        "would save too few bytes for its time)",
        "  by name, to h.0: attention, compile, halve; no liveness (its attention has no mask that says what is padding)",
        "    wide  shape: out = 16 is not >=48",
        "    head  name h.0.c_proj does not match lm_head",
        "    rest  matches, and decides",
    ]


def test_rule_that_comes_too_late_is_told():
    assert "    rest  would match, but an earlier rule decides" in explained("h.0.c_attn").splitlines()


def test_site_of_a_module_trained_whole_is_decided_by_no_rule():
    rules = {"version": 1, "rules": RULES["rules"][2:], "train": ["h.0"]}
    lines = lora_fx.explain(zoo.Gpt(), "h.0.c_attn", rules).splitlines()
    assert lines[-2:] == ["  train: under train: h.0", "    rest  would match, but train: decides"]


def test_skipped_and_tied_site_is_told_with_the_reason():
    text = explained("lm_head")
    assert "tied to  wte.weight, which an adapter here leaves alone" in text
    assert "lm_head" in text


def test_globs_and_modules_explain_all_that_they_hold():
    assert explained("h.*.c_attn").count("adapt by wide") == 3
    assert explained("h.1").startswith("h.1 is not a site; these lie in it:\n  h.1.c_attn")


def test_name_of_nothing_is_an_error_with_the_nearest_names():
    with pytest.raises(UnknownPathError, match=r"nothing called h\.0\.c_atn; nearest: h\.0\.c_attn"):
        explained("h.0.c_atn")
    with pytest.raises(UnknownPathError, match="ln_f is a module without a weight that multiplies"):
        explained("ln_f")


def test_command_line_explains_a_model_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(4, 8), nn.Embedding(3, 4, max_norm=1.0))\n"
    )
    (tmp_path / "rules.yaml").write_text('version: 1\nrules:\n  - match: {name: "**"}\n')
    shown = CliRunner().invoke(main, ["explain", f"{tmp_path}/mine.py:make", "1", f"{tmp_path}/rules.yaml"])
    assert shown.exit_code == 0
    assert "refuse: max_norm rescales the rows" in shown.output
    lost = CliRunner().invoke(main, ["explain", f"{tmp_path}/mine.py:make", "7", f"{tmp_path}/rules.yaml"])
    assert lost.exit_code == 2
    assert "the model has nothing called 7" in lost.output


@pytest.mark.parametrize(
    "path", ["", "a..b", ".", "\x1b[31m", "[", "{" * 50, "x" * 5000], ids=lambda path: ascii(path[:9])
)
def test_paths_that_no_site_can_have_are_unknown_and_shown_in_one_short_line(path):
    with pytest.raises(UnknownPathError) as error:
        lora_fx.explain(nn.Sequential(nn.Linear(2, 2)), path, "attention")
    assert isinstance(error.value, LoraFxError)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400
