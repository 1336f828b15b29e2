"""Pages that need nothing else: no network, light and dark.  All HTML of the package is put together here."""

import html
import re
from collections.abc import Iterable
from importlib import resources

from lora_fx.text import json_text, visible

DARK = (
    "--box:#22262b;--ink:#ececec;--dim:#b5bac0;--line:#8b9199;--added:#6fd38a;--addedfill:#15301d;"
    "--removed:#ff9a94;--removedfill:#3a1a1a;--changed:#f2c14e;--changedfill:#352a10"
)
"""CSS: the colours of pictures on a dark ground."""
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def escape(text: str, kept: str = "") -> str:
    """Return a text for HTML and SVG, between quotes too; what is not seen and not `kept` is written out."""
    return html.escape(visible(text, kept))


def filled(template: str, **slots: str) -> str:
    """Return a template file of this folder with its {{slots}} filled in: HTML or CSS, in which texts are escaped."""
    text = resources.files("lora_fx.planning.render").joinpath(template).read_text(encoding="utf-8")
    return _SLOT.sub(lambda match: slots[match[1]], text)


def page(heading: str, header: str, main: str, style: str, paths: Iterable[Iterable[str]] = ()) -> str:
    """Return a page with search and folding: the heading is text, the rest HTML and CSS.

    What `data-k` numbers in `main` can be searched; `paths` holds for each number the paths that lead to it.
    """
    listed = json_text(list(map(list, paths)), separators=(",", ":")).replace("<", "\\u003c")
    return filled("page.html", heading=escape(heading), header=header, main=main, style=style, dark=DARK, paths=listed)


def entry(title: str, body: str, facts: str | None = None, opened: bool = True) -> str:
    """Return HTML that folds under a title, beside which `facts` stand; both are text, the body is HTML."""
    beside = f" <span>{escape(facts)}</span>" if facts is not None else ""
    return f"<details{' open' * opened}><summary><b>{escape(title)}</b>{beside}</summary>{body}</details>"


def searchable(body: str, number: int) -> str:
    """Return an entry with the number by which the page's `paths` and texts lead to it."""
    return body.replace("<details", f'<details data-k="{number}"', 1)


def scrolled(body: str, label: str) -> str:
    """Return HTML of a picture or table that may be wider than the page; `label` is what screen readers say."""
    return f'<div class="picture" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'


def preformatted(lines: str, label: str) -> str:
    """Return HTML of lines of code, which are HTML already; `label` is what screen readers say."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}">{lines}</pre>'
