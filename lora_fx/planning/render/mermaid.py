"""Flowcharts for Mermaid, as GitHub draws them.

A label does not begin with a sign: Mermaid would take `- ` or `+ ` for a list.
"""

from collections.abc import Iterable, Mapping, Sequence

from lora_fx.text import visible

MOST_EDGES, MOST_CHARACTERS = 500, 50_000
"""What GitHub draws at most."""
_CODES = str.maketrans(
    {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\\": "#92;"},
)


def flowchart(direction: str, lines: Iterable[str], styles: Mapping[str, str]) -> str:
    """Return a flowchart, `LR` or `TD`, of boxes, edges and subgraphs; `styles` is the CSS of each class of boxes."""
    classes = (f"  classDef {name} {style}" for name, style in styles.items())
    return "\n".join([f"flowchart {direction}", *lines, *classes])


def box(name: str, lines: Sequence[str], kind: str = "") -> str:
    """Return a box with lines of text, in the looks of the class `kind` if there is one."""
    return f'{name}["{label(lines)}"]' + (f":::{kind}" if kind else "")


def label(lines: Iterable[str]) -> str:
    """Return lines of text as they may stand between quotes."""
    return "<br>".join(visible(line).translate(_CODES) for line in lines)
