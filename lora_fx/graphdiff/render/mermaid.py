"""A GraphDiff as a Mermaid flowchart that GitHub draws: at most 500 edges and 50,000 characters, else it is folded.

A label does not begin with a sign: Mermaid would take `- ` or `+ ` for a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lora_fx.graphdiff.compare import GraphDiff, SiteChange
from lora_fx.graphdiff.render.blocks import SAME, Block, Box, blocks_of, boxes_of
from lora_fx.graphdiff.render.svg import title_of
from lora_fx.graphdiff.render.text import cost_text, groups_of, sites_text

MOST_EDGES, MOST_CHARACTERS = 450, 45_000
"""Somewhat below GitHub's limits."""
_STYLES = """  classDef added stroke:#1a6b2d,stroke-width:3px
  classDef removed stroke:#a3201d,stroke-width:2px,stroke-dasharray:6 4
  classDef changed stroke:#7a5200,stroke-width:3px
  classDef moved stroke:#7a5200,stroke-width:2px,stroke-dasharray:2 3"""
_LONGEST = 160


def diff_mermaid(diff: GraphDiff) -> str:
    """Return the most detailed flowchart that is within the limits."""
    if not diff:
        return 'flowchart TD\n  none["no difference"]'
    blocks = [block for block in blocks_of(diff._compared) if block.changed]
    groups = groups_of(diff.changes)
    levels: list[Callable[[], str]] = [
        lambda: _chart(line for k, block in enumerate(blocks) for line in _block(k, block, near=False)),
        lambda: _chart(line for k, block in enumerate(blocks) for line in _block(k, block, near=True)),
        lambda: _chart(_sites(groups)),
    ]
    for chart in (level() for level in levels):
        if fits(chart):
            return chart
    return _chart(_first_sites(groups))


def fits(chart: str) -> bool:
    """Whether GitHub draws the chart."""
    return len(chart) <= MOST_CHARACTERS and chart.count(" --> ") <= MOST_EDGES


def _chart(lines: Iterator[str]) -> str:
    return "\n".join(["flowchart TD", *lines, _STYLES])


def _block(number: int, block: Block, near: bool) -> Iterator[str]:
    """Yield a block as a subgraph; `near`: only the boxes that differ and those beside them."""
    boxes, edges = boxes_of(block)
    shown = set(range(len(boxes)))
    if near:
        differ = {i for i in shown if boxes[i].status != SAME}
        beside = {end for edge in edges for end in edge if differ & set(edge)}
        shown = differ | beside
    yield f'  subgraph b{number}["{_label(title_of(block))}"]'
    for i in sorted(shown):
        suffix = "" if boxes[i].status == SAME else f":::{boxes[i].status}"
        yield f'    b{number}_{i}["{_label(_said(boxes[i]))}"]{suffix}'
    for source, target in edges:
        if source in shown and target in shown:
            yield f"    b{number}_{source} --> b{number}_{target}"
    yield "  end"


def _said(box: Box) -> str:
    rules = dict.fromkeys(step.rule for step in box.steps if step.rule)
    first = box.label if box.status == SAME else f"{box.status}: {box.label}"
    return "\n".join([first, box.detail, *rules])


def _sites(groups: Sequence[list[SiteChange]]) -> Iterator[str]:
    for number, group in enumerate(groups):
        change = group[0]
        status = "changed" if change.removed and change.added else "added" if change.added else "removed"
        facts = [f"{status}: {sites_text(group)}", change.note, cost_text(change, len(group))]
        yield f'  s{number}["{_label(chr(10).join(filter(None, facts)))}"]:::{status}'


def _first_sites(groups: Sequence[list[SiteChange]]) -> Iterator[str]:
    room = MOST_CHARACTERS - len(_STYLES) - 200
    for number, line in enumerate(_sites(groups)):
        room -= len(line) + 1
        if room < 0:
            yield f'  more["… and {len(groups) - number:,} more"]'
            return
        yield line


def _label(text: str) -> str:
    """Return text as it may stand between quotes."""
    lines = (line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…" for line in text.split("\n"))
    codes = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\\": "#92;"}
    return "<br/>".join("".join(codes.get(letter, letter) for letter in line) for line in lines)
