"""The page of a plan, and of the difference of two: what is done and why, found by any path, small, harmless."""

from __future__ import annotations

import html
import json
import re

import pytest

from lora_fx.planning.decide import decide, on_modules
from lora_fx.planning.diff import plan_diff
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import Inventory
from lora_fx.planning.render import page as page_file
from lora_fx.planning.sites import Site
from lora_fx.rules.reader import read_rules
from tests.support.htmlpages import Page

RULES = {
    "version": 1,
    "rules": [
        {"name": "head", "match": {"name": "lm_head"}, "skip": "tied to the token embedding"},
        {"name": "attention", "match": {"name": "**.{q,v}_proj"}, "lora": {"r": 8}},
        {"name": "experts", "match": {"name": "**.gate"}, "lora": {"r": 2}},
        {"name": "again", "match": {"name": "**.q_proj"}, "lora": {"r": 1}},
    ],
    "train": ["norm"],
}
ONE_RULE = {"version": 1, "rules": RULES["rules"][1:2]}
REFUSAL = "its weight is quantised by a library that lora_fx does not know"


def linear(path: str, width: int = 16, **facts: object) -> Site:
    return Site(path, "linear", ("Linear",), (width, width), **facts)


def llama(blocks: int, content: dict[str, object] = RULES) -> Plan:
    """Return the plan of a model of so many blocks: q, k, v, a gate that is refused, and a head under two names."""
    sites = [
        site
        for k in range(blocks)
        for site in (
            *(linear(f"layers.{k}.{name}_proj") for name in "qkv"),
            linear(f"layers.{k}.gate", refusal=REFUSAL),
        )
    ]
    sites.append(linear("lm_head", 64, aliases=("output.projection",)))
    inventory = Inventory("Llama", tuple(sites), (("norm", 16),), 1_000_000)
    return on_modules(decide(read_rules(content), inventory))


def entries_of(text: str) -> list[tuple[str, list[str]]]:
    """Return (what is read, the paths that lead there) of each entry."""
    paths = json.loads(re.search(r'id="paths">(.*?)</script>', text)[1])
    found = re.findall(r'<(\w+) data-k="(\d+)"[^>]*>(.*?)</\1>', text, re.DOTALL)
    assert sorted(int(number) for _, number, _ in found) == list(range(len(paths)))
    return [(read(body), paths[int(number)]) for _, number, body in found]


def read(markup: str) -> str:
    """Return what is read of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def sections_of(text: str) -> dict[str, str]:
    """Return what is read in each section, by its title."""
    main = re.search(r"<main>(.*)</main>", text, re.DOTALL)[1]
    return {read(title): read(body) for title, body in re.findall(r"<h2>(.*?)</h2>(.*?)</section>", main, re.DOTALL)}


def test_page_says_of_every_kind_of_site_what_is_done_and_why():
    sections = sections_of(llama(4).to_html())
    assert list(sections) == ["Trainable parameters", "Adapted", "Trained whole", "Refused", "Left alone", "Notes"]
    assert "attention 8 sites · 2,048 parameters to train" in sections["Adapted"]
    assert "layers.{0..3}.q_proj ×4 Linear 16 → 16 + r=8 alpha=16 module 1,024" in sections["Adapted"]
    assert sections["Trained whole"].startswith("under train: norm 1 module · 16 parameters to train")
    assert f"{REFUSAL} 4 sites · asked for by rule experts" in sections["Refused"]
    assert "layers.{0..3}.gate ×4 Linear 16 → 16" in sections["Refused"]
    assert "tied to the token embedding 1 site · skipped by rule head" in sections["Left alone"]
    assert "no rule 4 sites" in sections["Left alone"]
    assert sections["Notes"] == "rule 'again' also matches 4 sites decided before it by 'attention'"


def test_head_of_the_page_has_the_sums():
    head = read(re.search(r"<header>.*?</header>", llama(4).to_html(), re.DOTALL)[0])
    assert "Trainable: 2,064 of 1,000,000 parameters (0.21 %)." in head
    for line in ("adapted 8 sites, 0 in graphs 2,048", "trained whole 1 module 16", "left alone 5 sites 0",
                 "refused 4 sites 0"):  # fmt: skip
        assert line in head


def test_bars_are_the_numbers_of_trained_parameters_the_largest_first():
    bars = re.search(r'<table class="bars".*?</table>', llama(4).to_html(), re.DOTALL)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", bars)
    assert [read(row) for row in rows] == [
        "layers.{0..3}.q_proj ×4 1,024 50 %", "layers.{0..3}.v_proj ×4 1,024 50 %", "train: norm 16 0.78 %",
    ]  # fmt: skip
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", bars)] == [100, 100, 1.56]


def test_many_bars_end_with_the_sum_of_the_rest():
    rules = [{"name": f"r{k}", "match": {"name": f"part{k}x.q_proj"}, "lora": {"r": k + 1}} for k in range(40)]
    sites = tuple(linear(f"part{k}x.q_proj", 64) for k in range(40))
    plan = on_modules(decide(read_rules({"version": 1, "rules": rules}), Inventory("M", sites, (), 10**6)))
    bars = re.search(r'<table class="bars".*?</table>', plan.to_html(), re.DOTALL)[0]
    rows = [read(row) for row in re.findall(r"<tr>(.*?)</tr>", bars)]
    assert len(rows) == 25
    assert rows[0].startswith("part39x.q_proj 5,120 ")
    assert rows[-1].startswith(f"16 more {128 * sum(range(1, 17)):,} ")


def test_plan_that_trains_nothing_has_no_bars():
    content = {"version": 1, "rules": [{"match": {"name": "**"}, "skip": "not now"}]}
    assert "Trainable parameters" not in sections_of(llama(2, content).to_html())


def test_every_path_leads_to_one_entry_though_blocks_are_folded():
    plan = llama(126)
    entries = entries_of(plan.to_html())
    assert len(entries) < 12
    leading = [path for _, paths in entries for path in paths]
    assert sorted(leading) == sorted(["norm", *(path for site in plan.sites for path in site.site.paths)])
    assert [text for text, paths in entries if "layers.77.v_proj" in paths] == [
        "layers.{0..125}.v_proj ×126 Linear 16 → 16 + r=8 alpha=16 module 32,256"
    ]
    assert [text for text, paths in entries if "output.projection" in paths] == ["lm_head Linear 64 → 64"]


def test_page_of_a_large_model_is_small_and_an_unfolded_one_stays_moderate():
    assert len(llama(126).to_html().encode()) < 60_000
    text = llama(5_000).to_html(fold=False)
    Page(text)
    assert len(text.encode()) < page_file.MOST_BYTES + 40_000
    assert "more left out to keep the page small" in text
    assert len(re.findall(r'<th scope="row">layers\.\d+\.gate</th>', text)) == 5_000  # those refused come first


def test_repeated_blocks_are_shown_one_by_one_if_asked():
    rows = [text for text, _ in entries_of(llama(3).to_html(fold=False))]
    assert sum(text.startswith("layers.") for text in rows) == 12


def test_every_page_says_its_own_signs_and_keys():
    plan, other = llama(2), llama(2, ONE_RULE)
    legends = [
        read(re.search(r"<footer.*?</footer>", text, re.DOTALL)[0])
        for text in (plan.to_html(), plan_diff(plan, other).to_html())
    ]
    assert all(legend.startswith("Keys: / search") and "box" not in legend for legend in legends)
    assert legends[0] != legends[1]


def test_difference_shows_both_sides_of_each_kind_of_site():
    other = llama(
        4, {**RULES, "rules": [RULES["rules"][0], {"name": "a", "match": {"name": "**.q_proj"}, "lora": {"r": 4}}]}
    )
    entries = entries_of(plan_diff(llama(4), other).to_html())
    shown = {text.split()[0]: (text, paths) for text, paths in entries}
    text, paths = shown["layers.{0..3}.q_proj"]
    assert "- Linear 16 → 16 + r=8 alpha=16" in text
    assert "+ Linear 16 → 16 + r=4 alpha=16" in text
    assert paths == [f"layers.{k}.q_proj" for k in range(4)]
    assert "layers.{0..3}.v_proj" in shown


def test_equal_plans_have_a_page_that_says_so():
    assert "No difference." in plan_diff(llama(1), llama(1)).to_html()


@pytest.mark.parametrize("make", [Plan.to_html, lambda plan: plan_diff(plan, llama(1)).to_html()])
def test_page_asks_nobody_for_anything_and_names_stay_text(make):
    evil = '</script><script>alert(1)</script><b a="'
    sites = (linear(f"{evil}.q_proj"), linear(f"x\x1b.{evil}.k_proj", refusal=evil))
    text = make(on_modules(decide(read_rules(ONE_RULE), Inventory(evil, sites, (), 9))))
    page = Page(text)
    assert not [attributes for _, attributes in page.tags if {"src", "href", "action"} & set(attributes)]
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "default-src 'none'" in text
    assert "{{" not in text
    assert "\x1b" not in text
