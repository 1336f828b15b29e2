"""The page that all HTML of this package is put into: no network, light and dark, search, folding."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources

from lora_fx.graphdiff.render.svg import DARK

_SLOT = re.compile(r"\{\{(\w+)\}\}")


def page(heading: str, header: str, main: str, style: str, paths: Sequence[Sequence[str]] = ()) -> str:
    """Return the page.

    Args:
        heading: text of the heading and title.
        header: HTML under the heading.
        main: HTML of the page's contents; what `data-k` numbers can be searched.
        style: more CSS.
        paths: for each number, paths by which it is found.
    """
    listed = json.dumps(list(map(list, paths)), separators=(",", ":")).replace("<", "\\u003c")
    slots = {
        "title": escape(heading),
        "heading": escape(heading),
        "header": header,
        "main": main,
        "style": style,
        "dark": DARK,
        "paths": listed,
    }
    template = resources.files("lora_fx.graphdiff.render").joinpath("page.html").read_text(encoding="utf-8")
    return _SLOT.sub(lambda match: slots[match[1]], template)
