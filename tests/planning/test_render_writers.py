"""The writers of pages, Mermaid and DOT that plans, diffs and the bench share: what is given to them stays text."""

from __future__ import annotations

from lora_fx.planning.render.dot import digraph, quoted
from lora_fx.planning.render.mermaid import box, flowchart
from lora_fx.planning.render.page import entry, page, preformatted, scrolled, searchable
from tests.support.htmlpages import Page


def test_box_of_mermaid_holds_lines_and_no_letter_that_could_end_it():
    assert box("n0", ['a"]', "<b> & `c` #1 \\"], "added") == (
        'n0["a#quot;]<br>#lt;b#gt; #amp; #96;c#96; #35;1 #92;"]:::added'
    )
    assert box("n0", ["a"]) == 'n0["a"]'


def test_flowchart_has_lines_between_its_direction_and_its_classes():
    assert flowchart("LR", ["  a --> b"], {"added": "fill:#fff"}) == (
        "flowchart LR\n  a --> b\n  classDef added fill:#fff"
    )


def test_text_of_dot_stands_between_quotes():
    label = quoted('a"\nb×')
    assert digraph("plan", [f"  n0 [label={label}]"]) == 'digraph plan {\n  n0 [label="a\\"\\nb×"]\n}'


def test_page_is_filled_with_texts_as_texts():
    evil = "</script><script>alert(1)</script>"
    body = scrolled("<svg></svg>", evil) + preformatted("line", evil)
    text = page(evil, "<p>header</p>", searchable(entry(evil, body, evil, opened=False), 0), "", [[evil]])
    Page(text)
    assert "<script>alert" not in text
    assert "{{" not in text
    assert '<details data-k="0"><summary>' in text


def test_entry_shows_its_facts_only_where_there_are_some():
    assert entry("a", "b") == "<details open><summary><b>a</b></summary>b</details>"
    assert entry("a", "b", "c") == "<details open><summary><b>a</b> <span>c</span></summary>b</details>"
