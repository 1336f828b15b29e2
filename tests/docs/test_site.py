"""The built documentation in a browser: nothing fails, nothing is asked of other machines, search finds, axe is content.

Needs chromium and the extra `browser`; left out where either is missing.  Screenshots are kept in build/pictures.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import CHROMIUM

pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "build" / "pictures"
SCREENS = [
    ("mkdocs", "", 1280, "light"), ("mkdocs", "", 390, "dark"), ("mkdocs", "tutorial/", 390, "light"),
    ("mkdocs", "performance/", 1280, "dark"), ("mkdocs", "coming-from-peft/", 390, "light"), ("mkdocs", "cli/", 390, "dark"),
    ("mkdocs", "reference/api/", 1280, "dark"),
    ("zensical", "", 390, "dark"), ("zensical", "performance/", 390, "light"), ("zensical", "errors/", 1280, "light"),
]  # fmt: skip
PAGES = ["", "tutorial/", "watching/", "recipes/", "rules/", "errors/", "cli/", "reference/api/"]
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Visit:
    """A page in the browser, with what it has complained of and asked for."""

    def __init__(self, browser, home: str, width: int = 1280, scheme: str = "light") -> None:
        self.home, self.complaints, self.foreign = home, [], []
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 1000})
        self.page.on("console", lambda said: self._complain(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self._complain(str(error)))
        self.page.on("request", lambda asked: self._asked(asked.url))

    def _complain(self, text: str) -> None:
        self.complaints.append(text)

    def _asked(self, url: str) -> None:
        if not url.startswith((self.home, "data:", "blob:")):
            self.foreign.append(url)

    def open(self, path: str) -> None:
        self.page.goto(self.home + path)
        self.page.wait_for_load_state("networkidle")


BUILDERS = pytest.mark.parametrize("site", ["mkdocs", "zensical"], indirect=True)


@pytest.fixture(scope="module")
def site(request, tmp_path_factory):
    """The address at which the site is served, as one of the two builds it from the same sources."""
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("docs", "lora_fx"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    subprocess.run(
        [sys.executable, "-m", request.param, "build", "--strict"], cwd=folder, check=True, capture_output=True
    )
    handler = functools.partial(Quiet, directory=str(folder / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@BUILDERS
def test_pages_complain_of_nothing_and_ask_nothing_of_other_machines(browser, site):
    visit = Visit(browser, site)
    for path in PAGES:
        visit.open(path)
    assert (visit.complaints, visit.foreign) == ([], [])


@BUILDERS
def test_search_finds_fused_qkv(browser, site):
    visit = Visit(browser, site)
    visit.open("")
    visit.page.keyboard.press("/")
    visit.page.wait_for_timeout(500)
    visit.page.keyboard.type("fused qkv", delay=20)
    link = visit.page.locator("a[href*='recipes/'][href*='#fused-qkv']").first
    link.wait_for(state="attached", timeout=20_000)
    assert (visit.complaints, visit.foreign) == ([], [])


@BUILDERS
@pytest.mark.parametrize("path", ["errors/", "recipes/"])
def test_links_of_error_messages_lead_to_headings(browser, site, path):
    visit = Visit(browser, site)
    visit.open(path)
    anchors = {"errors/": "#ruleerror", "recipes/": "#quantised-base"}
    assert visit.page.locator(f"h2{anchors[path]}, h2:has({anchors[path]})").count() == 1


CUT = """() => [...document.querySelectorAll("article :is(table, pre > code, img, p, h1, h2, h3)")]
    .filter(part => {
        if (!part.getClientRects().length) return false
        for (let frame = part; frame && frame.tagName != "ARTICLE"; frame = frame.parentElement)
            if (["auto", "scroll"].includes(getComputedStyle(frame).overflowX)) return false
        return part.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    })
    .map(part => part.outerHTML.slice(0, 80))"""
"""What is wider than the screen and in no frame that scrolls."""


@pytest.mark.parametrize(("site", "path", "width", "scheme"), SCREENS, indirect=["site"])
def test_page_cuts_nothing_and_is_accessible_on_every_screen(browser, site, request, path, width, scheme):
    visit = Visit(browser, site, width, scheme)
    visit.open(path)
    PICTURES.mkdir(parents=True, exist_ok=True)
    builder = request.node.callspec.params["site"]
    visit.page.screenshot(
        path=PICTURES / f"{builder}-{path.strip('/').replace('/', '-') or 'landing'}-{width}-{scheme}.png"
    )
    assert visit.page.evaluate(CUT) == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert serious(axe.Axe().run(visit.page, context="article")) == []


@BUILDERS
def test_what_is_cut_off_is_found(browser, site):
    visit = Visit(browser, site, 390)
    visit.open("")
    visit.page.evaluate("document.querySelector('article p').style.width = '900px'")
    assert len(visit.page.evaluate(CUT)) == 1


@BUILDERS
def test_tables_of_training_steps_fit_on_a_phone_without_scrolling(browser, site):
    visit = Visit(browser, site, 390)
    visit.open("performance/")
    wide = """() => [...document.querySelectorAll("article table")]
        .filter(table => table.rows[0].innerText.includes("excess removed") && table.rows[0].cells.length < 8)
        .map(table => [table.offsetWidth, table.closest(".md-typeset__scrollwrap, article").clientWidth])"""
    sizes = visit.page.evaluate(wide)
    assert len(sizes) >= 4
    assert [(own, frame) for own, frame in sizes if own > frame] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_of_a_plan_stands_alone_and_is_accessible(browser, tmp_path, width, scheme):
    visit = plan_page(browser, tmp_path, width, scheme)
    PICTURES.mkdir(parents=True, exist_ok=True)
    visit.page.screenshot(path=PICTURES / f"plan-page-{width}-{scheme}.png", full_page=True)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert serious(axe.Axe().run(visit.page)) == []
    visit.page.locator("#open").click()
    reasons = visit.page.locator("summary b").all()
    assert len(reasons) >= 2
    assert all(part.bounding_box()["x"] >= 0 and _right(part) <= width for part in reasons)
    assert serious(axe.Axe().run(visit.page)) == []
    assert (visit.complaints, visit.foreign) == ([], [])


def test_search_in_the_page_of_a_plan_unfolds_what_it_finds_and_hides_the_rest(browser, tmp_path):
    visit = plan_page(browser, tmp_path)
    rows = visit.page.locator("tr[data-k]")
    everything = rows.count()
    left_alone = visit.page.locator("tr[data-k]", has_text="k_proj")
    assert not left_alone.is_visible()
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("layers.1.k_proj")
    shown = [row.inner_text().split()[0] for row in rows.all() if row.is_visible()]
    assert shown == ["layers.{0..2}.k_proj"]
    assert (
        visit.page.locator("#found").inner_text() == f"1 of {visit.page.locator('[data-k]').count()} entries, 1 paths"
    )
    assert not visit.page.locator(".bars").is_visible()
    visit.page.keyboard.press("Escape")
    assert visit.page.locator(".bars").is_visible()
    assert visit.page.locator("tr[data-k]:not(.hidden)").count() == everything


def plan_page(browser, folder: Path, width: int = 1280, scheme: str = "light") -> Visit:
    """Return a visit to the page of a plan, as a file."""
    import lora_fx
    from tests.support.clitools import small

    model, inputs = small()
    chosen = {"version": 1, "train": ["embed"], "rules": [
        {"name": "qv", "match": {"name": "**.{q,v}_proj"}, "lora": {"r": 2}},
        {"name": "head", "match": {"name": "lm_head"}, "skip": "it is tied to the embedding, as the card of the model says"},
    ]}  # fmt: skip
    (folder / "plan.html").write_text(lora_fx.plan(model, chosen, inputs).to_html(), encoding="utf-8")
    visit = Visit(browser, folder.as_uri() + "/", width, scheme)
    visit.open("plan.html")
    return visit


def _right(part) -> float:
    box = part.bounding_box()
    return box["x"] + box["width"]


def serious(result) -> list[str]:
    violations = result.response["violations"]
    return [
        f"{violation['id']}: {violation['help']}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
    ]
