"""A GraphDiff as one HTML page: the changes by site, then a picture and the statements of each kind of block."""

from collections.abc import Iterator

from lora_fx.graphdiff.changes import GraphDifference, SiteChange
from lora_fx.graphdiff.render.blocks import SAME, Block, Step, blocks_of
from lora_fx.graphdiff.render.svg import STYLE, drawing, title_of
from lora_fx.graphdiff.render.text import cost_text, groups_of, signed, sites_text, size_text, sums_text
from lora_fx.planning.render.page import KEYS, Entries, entry, escape, page, preformatted, scrolled
from lora_fx.text import count, thousands, visible

_LEGEND = (
    f"{KEYS} Tab goes from box to box.  Signs: + only on the second side, - only on the first, "
    "± on both and different, ↷ elsewhere in the order."
)


def diff_html(diff: GraphDifference) -> str:
    """Return the page."""
    entries = Entries()
    changes = [entries.add(_hunk(group), [change.path for change in group]) for group in groups_of(diff.changes)]
    blocks = blocks_of(diff.compared)
    blocks.sort(key=lambda block: not block.changed)
    pictures = [entries.add(_block(block), block.paths) for block in blocks]
    main = (
        f"<section><h2>What differs, by site</h2>{''.join(changes) or '<p>Nothing.</p>'}</section>"
        f"<section><h2>Blocks</h2>{''.join(pictures)}</section>"
    )
    return page(f"{diff.a} → {diff.b}", _sums(diff), main + entries.told(), STYLE, entries.paths, _LEGEND)


def _sums(diff: GraphDifference) -> str:
    if not diff:
        return f'<p class="sums">No difference; {count(diff.unchanged, "statement")} are the same.</p>'
    rows = [
        ("parameters", diff.parameters, thousands),
        ("bytes of parameters", diff.bytes, size_text),
        ("FLOP with weights, per row of input", diff.flops, thousands),
    ]
    body = "".join(
        f'<tr><th scope="row">{name}</th><td class="n">{written(a)}</td><td class="n">{written(b)}</td>'
        f'<td class="n">{signed(b - a, written)}</td></tr>'
        for name, (a, b), written in rows
    )
    heads = (f"- {escape(diff.a)}", f"+ {escape(diff.b)}", "change")
    head = "".join(f'<th class="n" scope="col">{text}</th>' for text in heads)
    return f'<p class="sums">{sums_text(diff)}</p><table><tr><td></td>{head}</tr>{body}</table>'


def _hunk(changes: list[SiteChange]) -> str:
    change = changes[0]
    facts = " · ".join(filter(None, (change.note, cost_text(change, len(changes)))))
    lines = [_line("d", "-", text) for text in change.removed] + [_line("a", "+", text) for text in change.added]
    return entry(sites_text(changes), preformatted("".join(lines), f"lines of {visible(change.path)}"), facts)


def _line(kind: str, sign: str, text: str) -> str:
    return f'<span class="{kind}">{sign}    {escape(text)}</span>'


def _block(block: Block) -> str:
    changed = sum(step.status != SAME for step in block.steps)
    facts = [f"{count(changed, 'statement')} differ" if changed else "the same", f"{len(block.steps)} in all"]
    facts += [f"{rule} ({count(number, 'site')})" for rule, number in block.rules.items()]
    title = title_of(block)
    picture, layout = drawing(block)
    svg = (
        f'<svg viewBox="0 0 {layout.width:g} {layout.height:g}" width="{layout.width:g}" height="{layout.height:g}" '
        f'role="group" aria-label="graph of {escape(title)}">{picture}</svg>'
    )
    lines = "".join(line for step in block.steps for line in _step_lines(step))
    statements = preformatted(lines, f"statements of {title}")
    body = scrolled(svg, f"picture of {title}") + f"<details><summary>All statements</summary>{statements}</details>"
    return entry(title, body, " · ".join(facts), opened=changed > 0)


def _step_lines(step: Step) -> Iterator[str]:
    if step.status == SAME:
        yield _line("s", " ", step.after)
        return
    if step.before:
        yield _line("d", "-", step.before)
    if step.after:
        yield _line("a", "+", step.after)
