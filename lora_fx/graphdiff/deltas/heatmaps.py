"""Deltas as pictures: heatmaps by layer and site, and singular values.  The numbers stand in the cells."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lora_fx.graphdiff.deltas.spectra import Delta, Deltas, ratio_text
from lora_fx.graphdiff.render.page import page
from lora_fx.graphdiff.render.svg import DARK
from lora_fx.text import count

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
STYLE = """
:root,svg{--heat:#8fbbe8}@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--heat:#2f5f94}}
:root[data-theme=dark]{--heat:#2f5f94}
.heat text{font:12px system-ui,sans-serif;fill:var(--ink,#1b1b1b)}.heat rect{fill:var(--heat)}
.heat .title{font:bold 14px system-ui,sans-serif}.bars{fill:var(--ink,#1b1b1b)}
"""
_CELL, _ROW, _LETTER = 84, 20, 6.7


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a site stands in a heatmap."""

    layer: str
    site: str


Shown = Callable[[Delta], tuple[float | None, str]]
"""Returns the value of a cell, and its text."""
MAPS: tuple[tuple[str, Shown], ...] = (
    ("rank r", lambda each: (each.r, str(each.r))),
    ("‖ΔW‖ / ‖W‖", lambda each: (each.ratio, ratio_text(each))),
    ("effective rank of ΔW", lambda each: (each.effective_rank, f"{each.effective_rank:.1f}")),
)


def places_of(paths: Sequence[str]) -> list[_Place]:
    """Return layer and site of each path: the number in it that takes most values is the layer's."""
    seen: dict[tuple[str, int], set[str]] = {}
    for path in paths:
        for position, number in enumerate(_NUMBER.findall(path)):
            seen.setdefault((_NUMBER.sub("#", path), position), set()).add(number)
    return [_place(path, seen) for path in paths]


def _place(path: str, seen: dict[tuple[str, int], set[str]]) -> _Place:
    matches = list(_NUMBER.finditer(path))
    if not matches:
        return _Place("", path)
    template = _NUMBER.sub("#", path)
    chosen = max(range(len(matches)), key=lambda position: (len(seen[template, position]), -position))
    match = matches[chosen]
    return _Place(path[: match.end()], path[match.end() :].lstrip(".") or path)


def heatmap(deltas: Deltas, title: str, shown: Shown) -> tuple[str, float, float]:
    """Return a heatmap as SVG elements, its width and its height."""
    places = places_of([each.path for each in deltas.sites])
    layers, sites = (list(dict.fromkeys(names)) for names in zip(*((p.layer, p.site) for p in places), strict=True))
    values = [shown(each) for each in deltas.sites]
    most = max((value for value, _ in values if value is not None), default=0.0) or 1.0
    left = 12 + _LETTER * max(len(layer) for layer in layers)
    widths = [max(_CELL, _LETTER * len(site) + 12) for site in sites]
    lefts = [left + sum(widths[:k]) for k in range(len(sites))]
    parts = [f'<text class="title" x="4" y="16">{escape(title)}</text>']
    parts += [f'<text x="{x:g}" y="38">{escape(site)}</text>' for site, x in zip(sites, lefts, strict=True)]
    parts += [f'<text x="4" y="{60 + k * _ROW}">{escape(layer)}</text>' for k, layer in enumerate(layers)]
    for place, each, (value, text) in zip(places, deltas.sites, values, strict=True):
        column = sites.index(place.site)
        corner = lefts[column], 46 + layers.index(place.layer) * _ROW
        shade = 0.06 + 0.94 * (value or 0.0) / most
        parts.append(_cell(corner, widths[column] - 2, shade, text, f"{each.path}: {title} {text}"))
    return "".join(parts), left + sum(widths) + 4, 52.0 + len(layers) * _ROW


def _cell(corner: tuple[float, float], width: float, shade: float, text: str, said: str) -> str:
    x, y = corner
    rect = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_ROW - 2}" fill-opacity="{shade:.2f}"/>'
    return f'<g><title>{escape(said)}</title>{rect}<text x="{x + 4:g}" y="{y + 14:g}">{escape(text)}</text></g>'


def deltas_svg(deltas: Deltas) -> str:
    """Return all heatmaps, one below the other."""
    parts, width, top = [], 300.0, 8.0
    for title, shown in MAPS if deltas.sites else ():
        drawn, wide, high = heatmap(deltas, title, shown)
        parts.append(f'<g transform="translate(0 {top:g})">{drawn}</g>')
        width, top = max(width, wide), top + high + 24
    dark = f"@media(prefers-color-scheme:dark){{svg{{--heat:#2f5f94;background:#16191d;{DARK}}}}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {top:g}" width="{width:g}" class="heat"'
    title = escape(f"adapters of {deltas.model}")
    return f'{head} role="img"><title>{title}</title><style>{STYLE}{dark}</style>{"".join(parts)}</svg>'


def deltas_html(deltas: Deltas) -> str:
    """Return the page: heatmaps, then a table of singular values for each kind of site."""
    groups: dict[str, list[Delta]] = {}
    for each, place in zip(deltas.sites, places_of([each.path for each in deltas.sites]), strict=True):
        groups.setdefault(place.site, []).append(each)
    maps = "".join(_figure(deltas, title, shown) for title, shown in MAPS if deltas.sites)
    tables = "".join(_table(k, site, found) for k, (site, found) in enumerate(groups.items()))
    main = f"<section><h2>By layer and site</h2>{maps}</section><section><h2>Singular values</h2>{tables}</section>"
    header = f'<p class="sums">{count(len(deltas.sites), "adapter")}; ΔW = scaling · B A.</p>'
    paths = [[each.path for each in found] for found in groups.values()]
    return page(f"Adapters of {deltas.model}", header, main, STYLE, paths)


def _figure(deltas: Deltas, title: str, shown: Shown) -> str:
    drawn, width, height = heatmap(deltas, title, shown)
    svg = (
        f'<svg class="heat" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="heatmap of {escape(title)}; the tables below have the numbers">{drawn}</svg>'
    )
    return (
        f"<details open><summary><b>{escape(title)}</b></summary>"
        f'<div class="picture" tabindex="0" role="region" aria-label="heatmap of {escape(title)}">{svg}</div></details>'
    )


def _table(number: int, site: str, found: list[Delta]) -> str:
    names = ("path", "r", "effective rank", "‖ΔW‖", "‖ΔW‖ / ‖W‖", "largest σ", "all σ, relative to it")
    head = "".join(f'<th scope="col"{"" if k in (0, 6) else " class=n"}>{name}</th>' for k, name in enumerate(names))
    rows = "".join(map(_row, found))
    label = f"singular values of {escape(site)}"
    return (
        f'<details data-k="{number}"{" open" if number == 0 else ""}><summary><b>{escape(site)}</b> '
        f"<span>{count(len(found), 'adapter')}</span></summary>"
        f'<div class="picture" tabindex="0" role="region" aria-label="{label}">'
        f"<table><tr>{head}</tr>{rows}</table></div></details>"
    )


def _row(each: Delta) -> str:
    largest = each.singular_values[0] if each.singular_values else 0.0
    cells = (str(each.r), f"{each.effective_rank:.1f}", f"{each.norm:.3g}", ratio_text(each), f"{largest:.3g}")
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    path = each.path if each.call is None else f"{each.path} (call {each.call})"
    return f'<tr><th scope="row">{escape(path)}</th>{numbers}<td>{_bars(each, largest)}</td></tr>'


def _bars(each: Delta, largest: float) -> str:
    """Return a bar for each singular value; the smallest that is no zero still shows."""
    heights = [24 * value / largest if largest else 0.0 for value in each.singular_values]
    bars = "".join(f"M{7 * k} 26v{-max(high, 0.5):.3g}h5V26z" for k, high in enumerate(heights))
    said = ", ".join(f"{value:.2g}" for value in each.singular_values[:16])
    label = f"singular values {said}{', …' if len(each.singular_values) > 16 else ''}"
    return (
        f'<svg class="bars" role="img" aria-label="{label}" width="{7 * len(heights)}" height="28">'
        f'<path d="{bars}"/></svg>'
    )
