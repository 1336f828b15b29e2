"""What plans, diffs and reports look like in a notebook (their text, in colours and in a frame that scrolls) and in a
console, where their names are typed: one line."""

from lora_fx.planning.render.page import escape
from lora_fx.text import MARKED, count, shortened

MOST_LINES = 300
_LONGEST_HEADING = 200
_STYLES = {
    "title": "font-weight:bold",
    "place": "color:light-dark(#00606f, #76e3ea)",
    "added": "color:light-dark(#1b6e1b, #6fdd8b)",
    "removed": "color:light-dark(#b00020, #ff8182)",
    "skipped": "color:light-dark(#8a6100, #eac54f)",
}


class InNotebook:
    """Shows an object's text in a notebook, at most MOST_LINES of it, and its heading as `repr`; `print` has all.

    Dataclasses say `repr=False` to get this one: that of thousands of sites fills screens of a traceback.
    """

    __slots__ = ()

    def _repr_html_(self) -> str:
        return notebook(str(self))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {shortened(self._heading(), _LONGEST_HEADING)}>"

    def _heading(self) -> str:
        """Return what stands for the whole in one line; the first line of its text unless a class knows better."""
        return str(self).partition("\n")[0]


def notebook(text: str) -> str:
    """Return HTML of a text: one element that needs no script and no style sheet."""
    lines = text.splitlines()
    shown = escape("\n".join(lines[:MOST_LINES]), "\n")
    for pattern, kind in MARKED:
        shown = pattern.sub(rf'<span style="{_STYLES[kind]}">\g<0></span>', shown)
    left = len(lines) - MOST_LINES
    more = f"\n<i>… {count(left, 'line')} more: print it</i>" if left > 0 else ""
    return f'<pre style="overflow-x:auto;line-height:1.35">{shown}{more}</pre>'
