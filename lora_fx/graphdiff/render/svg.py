"""A GraphDiff as SVG: the blocks that differ, each kind once.  Signs and outlines say what colours say."""

from lora_fx.graphdiff.changes import GraphDifference
from lora_fx.graphdiff.render.blocks import SAME, SYMBOLS, Block, Box, blocks_of, boxes_of
from lora_fx.graphdiff.render.layout import HEIGHT, WIDTH, BoxLayout, Piece, layered
from lora_fx.graphdiff.render.text import folded
from lora_fx.planning.render.page import DARK, escape

STYLE = """
.box rect{fill:var(--box,#fff);stroke:var(--line,#767676);stroke-width:1}
.box text{font:13px system-ui,sans-serif;fill:var(--ink,#1b1b1b)}
.box text.detail{font-size:11px;fill:var(--dim,#595959)}
.box.added rect{fill:var(--addedfill,#e3f6e5);stroke:var(--added,#1a6b2d);stroke-width:3}
.box.removed rect{fill:var(--removedfill,#fdeaea);stroke:var(--removed,#a3201d);stroke-width:2;stroke-dasharray:6 4}
.box.changed rect{fill:var(--changedfill,#fff3d6);stroke:var(--changed,#7a5200);stroke-width:3}
.box.moved rect{fill:var(--changedfill,#fff3d6);stroke:var(--changed,#7a5200);stroke-width:2;stroke-dasharray:2 3}
.edge{fill:none;stroke:var(--line,#767676);stroke-width:1.2}
.edge.added{stroke:var(--added,#1a6b2d);stroke-width:2.4}
.edge.removed{stroke:var(--removed,#a3201d);stroke-width:2;stroke-dasharray:6 4}
"""
_MOST_BLOCKS = 24
_LETTERS = 27


def diff_svg(diff: GraphDifference) -> str:
    """Return one picture of the blocks that differ, or of nothing if none does."""
    blocks = [block for block in blocks_of(diff.compared) if block.changed]
    parts: list[str] = []
    width, top = 400.0, 30.0
    for block in blocks[:_MOST_BLOCKS]:
        drawn, layout = drawing(block)
        parts.append(f'<text x="12" y="{top:g}" class="head">{escape(title_of(block))}</text>')
        parts.append(f'<g transform="translate(0 {top:g})">{drawn}</g>')
        width, top = max(width, layout.width), top + layout.height + 40
    if not blocks or len(blocks) > _MOST_BLOCKS:
        said = f"and {len(blocks) - _MOST_BLOCKS} more kinds of blocks" if blocks else "no difference"
        parts.append(f'<text x="12" y="{top:g}" class="head">{said}</text>')
    style = (
        f"{STYLE}svg{{background:var(--page,#fff)}}.head{{font:bold 14px system-ui,sans-serif;fill:var(--ink,#1b1b1b)}}"
        f"@media(prefers-color-scheme:dark){{svg{{--page:#16191d;{DARK}}}}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {top + 20:g}" width="{width:g}"'
    title = f"{diff.a} against {diff.b}"
    return f'{head} role="img"><title>{escape(title)}</title><style>{style}</style>{"".join(parts)}</svg>'


def title_of(block: Block) -> str:
    """Return `model.layers.{0..95} ×96`."""
    return folded([path or "(outside of blocks)" for path in block.paths])


def drawing(block: Block) -> tuple[str, BoxLayout]:
    """Return the boxes and lines of a block, and where they stand."""
    boxes, edges = boxes_of(block)
    layout = layered(len(boxes), edges)
    ordered = sorted(edges, key=lambda edge: edges[edge] != SAME)  # what differs lies above what does not
    lines = [_edge(layout.lines[edge], edges[edge], upwards=edge[0] > edge[1]) for edge in ordered]
    return "".join([*lines, *(_box(box, *layout.corners[i]) for i, box in enumerate(boxes))]), layout


def _edge(line: list[Piece], status: str, upwards: bool) -> str:
    """Return a line; all go down, and one that does not ends with an arrow."""
    (x, y, end), *rest = line
    path = f"M{x:g} {y:g}" + (f"V{end:g}" if end != y else "")
    for u, v, w in rest:
        middle = (end + v) / 2  # both handles at this height: the bend stays in the space between the rows
        path += f"C{x:g} {middle:g} {u:g} {middle:g} {u:g} {v:g}" + (f"V{w:g}" if w != v else "")
        x, end = u, w
    return f'<path class="edge {status}" d="{path}{"m-4 7l4-7l4 7" if upwards else ""}"/>'


def _box(box: Box, x: float, y: float) -> str:
    label, detail = (_cut(text) for text in (box.label, box.detail))
    sign, said = SYMBOLS[box.status].strip(), escape(said_of(box), kept="\n")
    return (
        f'<g class="box {box.status}" role="img" tabindex="0" aria-label="{said}">'
        f'<title>{said}</title><rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x + 8:g}" y="{y + 18:g}">{escape(f"{sign} {label}" if sign else label)}</text>'
        f'<text class="detail" x="{x + 8:g}" y="{y + 34:g}">{escape(detail)}</text></g>'
    )


def _cut(text: str) -> str:
    """Return the end of a long path: it says most."""
    return text if len(text) <= _LETTERS else f"…{text[1 - _LETTERS :]}"


_MOST_LINES = 6


def said_of(box: Box) -> str:
    """Return all that is known of a box: where, what, lines of both sides, sizes, rule."""
    lines = [f"{box.path or 'block'}: {box.status}"]
    for step in box.steps[:_MOST_LINES]:
        if step.before == step.after:
            lines.append(f"  {step.after}" + (f"  → {step.value}" if step.value else ""))
            continue
        lines += [f"- {step.before}"] if step.before else []
        lines += [f"+ {step.after}"] if step.after else []
        lines += [f"  → {step.value}"] if step.value else []
    if len(box.steps) > _MOST_LINES:
        lines.append(f"  … {len(box.steps) - _MOST_LINES} more")
    return "\n".join([*lines, *dict.fromkeys(step.rule for step in box.steps if step.rule)])
