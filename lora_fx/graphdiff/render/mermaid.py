"""A GraphDiff as a Mermaid flowchart that GitHub draws; what would be too large for it is folded."""

from collections.abc import Callable, Iterator, Sequence

from lora_fx.graphdiff.changes import GraphDifference, SiteChange
from lora_fx.graphdiff.render.blocks import SAME, Block, Box, blocks_of, boxes_of
from lora_fx.graphdiff.render.svg import title_of
from lora_fx.graphdiff.render.text import cost_text, groups_of, sites_text
from lora_fx.planning.render.mermaid import MOST_CHARACTERS, MOST_EDGES, box, flowchart, label

_STYLES = {
    "added": "stroke:#1a6b2d,stroke-width:3px",
    "removed": "stroke:#a3201d,stroke-width:2px,stroke-dasharray:6 4",
    "changed": "stroke:#7a5200,stroke-width:3px",
    "moved": "stroke:#7a5200,stroke-width:2px,stroke-dasharray:2 3",
}
_ROOM = MOST_CHARACTERS * 9 // 10
"""Characters that a chart may have: somewhat below GitHub's limit."""
_LONGEST = 160
"""Characters of a line in a box."""


def diff_mermaid(diff: GraphDifference) -> str:
    """Return the most detailed flowchart that is within the limits."""
    if not diff:
        return flowchart("TD", [f"  {box('none', ['no difference'])}"], {})
    blocks = [block for block in blocks_of(diff.compared) if block.changed]
    groups = groups_of(diff.changes)
    levels: list[Callable[[], Iterator[str]]] = [
        lambda: (line for k, block in enumerate(blocks) for line in _block(k, block, near=False)),
        lambda: (line for k, block in enumerate(blocks) for line in _block(k, block, near=True)),
        lambda: _sites(groups),
    ]
    for chart in (flowchart("TD", level(), _STYLES) for level in levels):
        if fits(chart):
            return chart
    return flowchart("TD", _first_sites(groups), _STYLES)


def fits(chart: str) -> bool:
    """Whether GitHub draws the chart."""
    return len(chart) <= _ROOM and chart.count(" --> ") <= MOST_EDGES * 9 // 10


def _block(number: int, block: Block, near: bool) -> Iterator[str]:
    """Yield a block as a subgraph; `near`: only the boxes that differ and those beside them."""
    boxes, edges = boxes_of(block)
    shown = set(range(len(boxes)))
    if near:
        differ = {i for i in shown if boxes[i].status != SAME}
        shown = differ | {end for edge in edges for end in edge if differ & set(edge)}
    yield f'  subgraph b{number}["{label(_cut([title_of(block)]))}"]'
    for i in sorted(shown):
        yield f"    {box(f'b{number}_{i}', _lines(boxes[i]), '' if boxes[i].status == SAME else boxes[i].status)}"
    for source, target in edges:
        if source in shown and target in shown:
            yield f"    b{number}_{source} --> b{number}_{target}"
    yield "  end"


def _lines(drawn: Box) -> list[str]:
    rules = dict.fromkeys(step.rule for step in drawn.steps if step.rule)
    first = drawn.label if drawn.status == SAME else f"{drawn.status}: {drawn.label}"
    return _cut([first, drawn.detail, *rules])


def _cut(texts: Sequence[str]) -> list[str]:
    """Return the lines of the texts, long ones cut."""
    lines = [line for text in texts for line in text.split("\n")]
    return [line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…" for line in lines]


def _sites(groups: Sequence[list[SiteChange]]) -> Iterator[str]:
    for number, group in enumerate(groups):
        change = group[0]
        status = "changed" if change.removed and change.added else "added" if change.added else "removed"
        facts = [f"{status}: {sites_text(group)}", change.note, cost_text(change, len(group))]
        yield f"  {box(f's{number}', _cut([fact for fact in facts if fact]), status)}"


def _first_sites(groups: Sequence[list[SiteChange]]) -> Iterator[str]:
    """Yield the boxes of as many sites as there is room for."""
    room = len(flowchart("TD", [], _STYLES)) + 200
    for number, line in enumerate(_sites(groups)):
        room += len(line) + 1
        if room > _ROOM:
            yield f"  {box('more', [f'… and {len(groups) - number:,} more'])}"
            return
        yield line
