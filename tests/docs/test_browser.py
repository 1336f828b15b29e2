"""Diffs and adapters as pages in a browser: nothing fails, nothing is asked for, search and folding work, axe is content.

Needs chromium and the extra `browser`; left out where either is missing.  Screenshots are kept in build/pictures.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import lora_fx
from lora_fx.graphdiff.diff import compare
from tests.conftest import CHROMIUM
from tests.support import zoo
from tests.support.graphs import decoder
from tests.support.pictures import RECORD

pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

PICTURES = Path(__file__).parents[2] / "build" / "pictures"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files: the diff of a model of 12 layers, its adapters, a training run, and the diff of a decoder of 96 layers."""
    folder = tmp_path_factory.mktemp("pages")
    model = zoo.Gpt(layers=12).eval()
    chosen = {"version": 1, "rules": [
        {"name": "attention", "match": {"name": "**.c_attn"}, "lora": {"r": 8}},
        {"name": "mlp", "match": {"name": "**.{c_fc,c_out}"}, "lora": {"r": 4}},
    ]}  # fmt: skip
    tuned = lora_fx.apply(model, chosen, (zoo.tokens(2, 6),))
    for parameter in lora_fx.parameters(tuned):
        parameter.data.normal_(0, 0.1)
    large = compare(decoder(96, nodes=110), decoder(96, adapted=True, nodes=110, ranks=tuple(range(1, 97))))
    texts = {"diff": lora_fx.diff(model, tuned).to_html(), "deltas": lora_fx.deltas(tuned).to_html()}
    texts["training"] = lora_fx.read_record(RECORD).to_html()
    for name, text in (texts | {"large": large.to_html()}).items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


class Visit:
    """A page, with what it has complained of and asked for."""

    def __init__(self, browser, file: Path, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 1400})
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda asked: self.asked.append(asked.url))
        self.page.goto(file.as_uri())

    def shown(self) -> list[str]:
        """The paths of the entries that are shown."""
        return [row.inner_text() for row in self.page.locator("details[data-k]:not(.hidden) > summary b").all()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["diff", "deltas", "training"])
def test_page_has_no_errors_asks_for_nothing_and_is_accessible(browser, pages, name, scheme):
    visit = Visit(browser, pages / f"{name}.html", scheme)
    PICTURES.mkdir(parents=True, exist_ok=True)
    visit.page.screenshot(path=PICTURES / f"{name}-{scheme}.png")
    visit.page.locator("#open").click()
    violations = axe.Axe().run(visit.page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in violations if v["impact"] in ("serious", "critical")] == []
    assert (visit.complaints, visit.asked) == ([], [(pages / f"{name}.html").as_uri()])


def test_search_finds_one_layer_among_repeated_ones(browser, pages):
    visit = Visit(browser, pages / "diff.html")
    everything = visit.shown()
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("h.7.c_attn")
    assert visit.shown() == ["h.{0..11}.c_attn ×12"]
    assert visit.page.locator("#found").inner_text() == f"1 of {len(everything)} entries, 1 paths"
    visit.page.keyboard.press("Escape")
    assert visit.shown() == everything
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("no such thing")
    assert visit.shown() == []


def test_blocks_fold_by_mouse_and_keyboard(browser, pages):
    visit = Visit(browser, pages / "diff.html")
    first = visit.page.locator("main details").first
    line = first.locator("pre")
    assert line.is_visible()
    first.locator("summary").click()
    assert not line.is_visible()
    first.locator("summary").press("Enter")
    assert line.is_visible()
    visit.page.locator("#close").click()
    assert visit.page.locator("main details[open]").count() == 0
    visit.page.locator("#open").click()
    assert visit.page.locator("main details:not([open])").count() == 0


def test_a_box_tells_shapes_and_rule_on_hover_and_on_focus(browser, pages):
    visit = Visit(browser, pages / "diff.html")
    box, info = visit.page.locator(".box.changed").first, visit.page.locator("#info")
    assert not info.is_visible()
    box.hover()
    assert "rule attention · r=8 scaling=2" in info.inner_text()
    assert "float32 [" in info.inner_text()
    visit.page.mouse.move(5, 5)
    assert not info.is_visible()
    box.focus()
    assert "self.c_attn.lora_B(" in info.inner_text()


def test_theme_can_be_chosen_against_the_system(browser, pages):
    visit = Visit(browser, pages / "diff.html", "dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = visit.page.evaluate(colour)
    visit.page.locator("#theme").click()
    assert visit.page.evaluate(colour) != before == "rgb(22, 25, 29)"


def test_page_of_96_layers_is_small_and_opens_at_once(browser, pages):
    file = pages / "large.html"
    assert file.stat().st_size < 2_000_000
    started = time.perf_counter()
    visit = Visit(browser, file)
    visit.page.locator("main details pre").first.wait_for(state="visible")
    assert time.perf_counter() - started < 3
    assert visit.complaints == []
