"""Plans, diffs and reports in a notebook: their text in one element, escaped, in colours, of bounded length."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Exported, MergeReport
from lora_fx.planning.render.notebook import MOST_LINES, notebook

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def shown_objects() -> dict[str, object]:
    tuned = lora_fx.apply(MODEL, r=2, target="0", backend="modules")
    nn.init.normal_(tuned[0].lora_B["default"].weight)
    return {
        "plan": lora_fx.plan(MODEL, r=2, target="0"),
        "diff": lora_fx.diff(MODEL, tuned),
        "report": lora_fx.inspect(tuned),
        "deltas": lora_fx.deltas(tuned),
        "audit": lora_fx.audit(tuned),
        "extract": lora_fx.extracted(lora_fx.merge(tuned), MODEL, 2)[1],
        "remerge": lora_fx.remerged(tuned),
        "merge": MergeReport("out", (), 3, (), (), False),
        "export": Exported("peft", Path("adapter"), 1e-7, 1e-6, 0.5),
    }


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("name", ["plan", "diff", "report", "deltas", "audit", "extract", "remerge", "merge", "export"])
def test_object_shows_its_whole_text_in_one_element(name):
    torch.manual_seed(0)
    thing = shown_objects()[name]
    page = thing._repr_html_()
    assert text_of(page) == str(thing)
    assert page.startswith("<pre ")
    assert page.count("<pre") == 1
    assert "<script" not in page


@pytest.mark.parametrize("name", ["plan", "diff", "report", "deltas", "audit", "extract", "merge"])
def test_object_whose_name_is_typed_in_a_console_is_one_line(name):
    thing = shown_objects()[name]
    assert re.fullmatch(r"<\w+: [^\n]{3,200}>", repr(thing))
    assert type(thing).__name__ in repr(thing)


def test_what_is_added_stands_out():
    assert re.search(r'<span style="color:[^"]*">\+ r=2 alpha=4</span>', shown_objects()["plan"]._repr_html_())


def test_names_are_text_and_never_markup():
    page = notebook("+<script>alert('x')</script>\x1b[31m")
    assert "<script" not in page
    assert "\x1b" not in page


def test_long_text_ends_with_how_much_is_left_out():
    page = notebook("\n".join(f"line {k}" for k in range(MOST_LINES + 5)))
    assert f"line {MOST_LINES - 1}" in page
    assert f"line {MOST_LINES}" not in page
    assert "… 5 lines more" in page
