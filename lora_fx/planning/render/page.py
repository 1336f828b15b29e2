"""Pages that need nothing else: no network, light and dark.  All HTML of the package is put together here."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources

from lora_fx.text import json_text, thousands, visible

MOST_BYTES = 1_800_000
"""Size of the entries of a page above which more are left out; it says how many."""
_MOST_PATHS = 20_000
KEYS = "Keys: / search, Esc ends it, Enter folds."
"""How every page is used."""

DARK = (
    "--box:#22262b;--ink:#ececec;--dim:#b5bac0;--line:#8b9199;--added:#6fd38a;--addedfill:#15301d;"
    "--removed:#ff9a94;--removedfill:#3a1a1a;--changed:#f2c14e;--changedfill:#352a10"
)
"""CSS: the colours of pictures on a dark ground."""
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_ELEMENT = re.compile(r"^<\w+")


def escape(text: str, kept: str = "") -> str:
    """Return a text for HTML and SVG, between quotes too; what is not seen and not `kept` is written out."""
    return html.escape(visible(text, kept))


def _filled(template: str, **slots: str) -> str:
    """Return a template file of this folder with its {{slots}} filled in: HTML or CSS, in which texts are escaped."""
    text = resources.files("lora_fx.planning.render").joinpath(template).read_text(encoding="utf-8")
    return _SLOT.sub(lambda match: slots[match[1]], text)


def page(
    heading: str, header: str, main: str, style: str, paths: Iterable[Iterable[str]] = (), legend: str = KEYS
) -> str:
    """Return a page with search and folding: the heading and the legend are texts, the rest HTML and CSS.

    What `data-k` numbers in `main` can be searched; `paths` holds for each number the paths that lead to it.
    """
    return _filled(
        "page.html",
        heading=escape(heading),
        header=header,
        main=main,
        legend=escape(legend),
        style=style,
        dark=DARK,
        paths=_listed(paths),
    )


def _listed(paths: Iterable[Iterable[str]]) -> str:
    """Return JSON that can stand in a script."""
    return json_text(list(map(list, paths)), separators=(",", ":")).replace("<", "\\u003c")


@dataclass(slots=True)
class Entries:
    """What can be searched in a page, as long as there is room for it."""

    size: int = 0
    left_out: int = 0
    paths: list[list[str]] = field(default_factory=list)
    """Of each entry."""

    def add(self, body: str, paths: Sequence[str]) -> str:
        """Return HTML of one element as an entry to which paths lead, as its text does; nothing if the page is full."""
        kept = list(paths[:_MOST_PATHS])
        body = searchable(body, len(self.paths))
        length = len(body.encode()) + len(_listed([kept]))
        if self.size + length > MOST_BYTES:
            self.left_out += 1
            return ""
        self.size += length
        self.paths.append(kept)
        return body

    def told(self) -> str:
        """Return HTML that says how many entries are left out; nothing if none is."""
        if not self.left_out:
            return ""
        number = thousands(self.left_out)
        return f"<p>{number} more left out to keep the page small: the text and the JSON form have them.</p>"


def entry(title: str, body: str, facts: str | None = None, opened: bool = True) -> str:
    """Return HTML that folds under a title, beside which `facts` stand; both are text, the body is HTML."""
    beside = f" <span>{escape(facts)}</span>" if facts is not None else ""
    return f"<details{' open' * opened}><summary><b>{escape(title)}</b>{beside}</summary>{body}</details>"


def searchable(body: str, number: int) -> str:
    """Return HTML of one element with the number by which the page's `paths` and texts lead to it."""
    return _ELEMENT.sub(rf'\g<0> data-k="{number}"', body, count=1)


def scrolled(body: str, label: str) -> str:
    """Return HTML of a picture or table that may be wider than the page; `label` is what screen readers say."""
    return f'<div class="picture" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'


def preformatted(lines: str, label: str) -> str:
    """Return HTML of lines of code, which are HTML already; `label` is what screen readers say."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}">{lines}</pre>'
