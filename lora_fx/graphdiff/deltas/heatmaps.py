"""Deltas as pictures: heatmaps by layer and site, and singular values.  The numbers stand in the cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_fx.graphdiff.deltas.spectra import DeltaRow, ratio_text
from lora_fx.planning.render.page import DARK, entry, escape, page, scrolled, searchable
from lora_fx.planning.rows import NUMBER
from lora_fx.text import count

STYLE = """
:root,svg{--heat:#8fbbe8}@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--heat:#2f5f94}}
:root[data-theme=dark]{--heat:#2f5f94}
.heat text{font:12px system-ui,sans-serif;fill:var(--ink,#1b1b1b)}.heat rect{fill:var(--heat)}
.heat .title{font:bold 14px system-ui,sans-serif}.bars{fill:var(--ink,#1b1b1b)}
"""
_CELL, _ROW, _LETTER = 84, 20, 6.7


Shown = Callable[[DeltaRow], tuple[float | None, str]]
"""Returns the value of a cell, and its text."""
MAPS: tuple[tuple[str, Shown], ...] = (
    ("rank r", lambda row: (row.r, str(row.r))),
    ("‖ΔW‖ / ‖W‖", lambda row: (row.ratio, ratio_text(row))),
    ("effective rank of ΔW", lambda row: (row.effective_rank, f"{row.effective_rank:.1f}")),
)


def places_of(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return (layer, site) of each path: the number in it that takes most values is the layer's."""
    values: dict[tuple[str, int], set[str]] = {}
    for path in paths:
        for position, number in enumerate(NUMBER.findall(path)):
            values.setdefault((NUMBER.sub("#", path), position), set()).add(number)
    return [_place(path, values) for path in paths]


def _place(path: str, values: dict[tuple[str, int], set[str]]) -> tuple[str, str]:
    matches = list(NUMBER.finditer(path))
    if not matches:
        return "", path
    template = NUMBER.sub("#", path)
    chosen = max(range(len(matches)), key=lambda position: (len(values[template, position]), -position))
    match = matches[chosen]
    return path[: match.end()], path[match.end() :].lstrip(".") or path


@dataclass(frozen=True, slots=True)
class HeatCell:
    """One cell of a heatmap."""

    row: str
    column: str
    value: float | None
    """By which it is shaded, from 0 to the largest of the map; None for not at all."""
    text: str
    said: str
    """What is told of it under the pointer."""


def heatmap(cells: Sequence[HeatCell], title: str, narrowest: int = _CELL) -> tuple[str, float, float]:
    """Return a heatmap as SVG elements, its width and its height in pixels.

    Args:
        cells: rows and columns stand in the order in which they occur first.
        title: of the map.
        narrowest: width of a column, in pixels, if the name of it is not wider.
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*((c.row, c.column) for c in cells), strict=True))
    most = max((cell.value for cell in cells if cell.value is not None), default=0.0) or 1.0
    left = 12 + _LETTER * max(len(row) for row in rows)
    widths = [max(narrowest, _LETTER * len(column) + 12) for column in columns]
    lefts = [left + sum(widths[:k]) for k in range(len(columns))]
    parts = [f'<text class="title" x="4" y="16">{escape(title)}</text>']
    parts += [f'<text x="{x:g}" y="38">{escape(column)}</text>' for column, x in zip(columns, lefts, strict=True)]
    parts += [f'<text x="4" y="{60 + k * _ROW}">{escape(row)}</text>' for k, row in enumerate(rows)]
    across, down = ({name: k for k, name in enumerate(names)} for names in (columns, rows))
    for cell in cells:
        column = across[cell.column]
        corner = lefts[column], 46 + down[cell.row] * _ROW
        shade = 0.06 + 0.94 * (cell.value or 0.0) / most
        parts.append(_drawn(corner, widths[column] - 2, shade, cell.text, cell.said))
    return "".join(parts), left + sum(widths) + 4, 52.0 + len(rows) * _ROW


def _drawn(corner: tuple[float, float], width: float, shade: float, text: str, said: str) -> str:
    x, y = corner
    rect = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_ROW - 2}" fill-opacity="{shade:.2f}"/>'
    return f'<g><title>{escape(said)}</title>{rect}<text x="{x + 4:g}" y="{y + 14:g}">{escape(text)}</text></g>'


def _heatmap(rows: Sequence[DeltaRow], title: str, shown: Shown) -> tuple[str, float, float]:
    """Return a heatmap of adapters by layer and site."""
    cells = []
    for row, (layer, site) in zip(rows, places_of([row.path for row in rows]), strict=True):
        value, text = shown(row)
        column = f"{site} ({row.adapter})" if row.adapter else site
        cells.append(HeatCell(layer, column, value, text, f"{row.name}: {title} {text}"))
    return heatmap(cells, title)


def stacked_svg(drawings: Sequence[tuple[str, float, float]], title: str, style: str) -> str:
    """Return drawings, each with its width and height, one below the other as one picture, light and dark."""
    parts, width, top = [], 300.0, 8.0
    for drawn, wide, high in drawings:
        parts.append(f'<g transform="translate(0 {top:g})">{drawn}</g>')
        width, top = max(width, wide), top + high + 24
    dark = f"@media(prefers-color-scheme:dark){{svg{{--heat:#2f5f94;background:#16191d;{DARK}}}}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {top:g}" width="{width:g}" class="heat"'
    return f'{head} role="img"><title>{escape(title)}</title><style>{style}{dark}</style>{"".join(parts)}</svg>'


def drawing(drawn: tuple[str, float, float], label: str) -> str:
    """Return SVG elements of a width and a height as a picture in a page; `label` is what screen readers say."""
    inside, width, height = drawn
    return (
        f'<svg class="heat" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(label)}">{inside}</svg>'
    )


def deltas_svg(model: str, rows: Sequence[DeltaRow]) -> str:
    """Return all heatmaps of a model's adapters, one below the other."""
    return stacked_svg([_heatmap(rows, *shown) for shown in MAPS if rows], f"adapters of {model}", STYLE)


def deltas_html(model: str, rows: Sequence[DeltaRow]) -> str:
    """Return the page: heatmaps, then a table of singular values for each kind of site."""
    groups: dict[str, list[DeltaRow]] = {}
    for row, (_, site) in zip(rows, places_of([row.path for row in rows]), strict=True):
        groups.setdefault(site, []).append(row)
    maps = "".join(_figure(rows, title, shown) for title, shown in MAPS if rows)
    tables = "".join(_table(k, site, group) for k, (site, group) in enumerate(groups.items()))
    main = f"<section><h2>By layer and site</h2>{maps}</section><section><h2>Singular values</h2>{tables}</section>"
    header = f'<p class="sums">{count(len(rows), "adapter")}; ΔW = scaling · B A.</p>'
    return page(f"Adapters of {model}", header, main, STYLE, ([row.path for row in group] for group in groups.values()))


def _figure(rows: Sequence[DeltaRow], title: str, shown: Shown) -> str:
    svg = drawing(_heatmap(rows, title, shown), f"heatmap of {title}; the tables below have the numbers")
    return entry(title, scrolled(svg, f"heatmap of {title}"))


def _table(number: int, site: str, rows: Sequence[DeltaRow]) -> str:
    names = ("path", "r", "effective rank", "‖ΔW‖", "‖ΔW‖ / ‖W‖", "largest σ", "all σ, relative to it")
    head = "".join(f'<th scope="col"{"" if k in (0, 6) else " class=n"}>{name}</th>' for k, name in enumerate(names))
    table = f"<table><tr>{head}</tr>{''.join(map(_row, rows))}</table>"
    body = scrolled(table, f"singular values of {site}")
    return searchable(entry(site, body, count(len(rows), "adapter"), opened=number == 0), number)


def _row(row: DeltaRow) -> str:
    largest = row.singular_values[0] if row.singular_values else 0.0
    cells = (str(row.r), f"{row.effective_rank:.1f}", f"{row.norm:.3g}", ratio_text(row), f"{largest:.3g}")
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    path = row.path if row.call is None else f"{row.path} (call {row.call})"
    return f'<tr><th scope="row">{escape(path)}</th>{numbers}<td>{_bars(row, largest)}</td></tr>'


def _bars(row: DeltaRow, largest: float) -> str:
    """Return a bar for each singular value; the smallest that is not zero still shows."""
    heights = [24 * value / largest if largest else 0.0 for value in row.singular_values]
    bars = "".join(f"M{7 * k} 26v{-max(high, 0.5):.3g}h5V26z" for k, high in enumerate(heights))
    said = ", ".join(f"{value:.2g}" for value in row.singular_values[:16])
    label = f"singular values {said}{', …' if len(row.singular_values) > 16 else ''}"
    return (
        f'<svg class="bars" role="img" aria-label="{label}" width="{7 * len(heights)}" height="28">'
        f'<path d="{bars}"/></svg>'
    )
