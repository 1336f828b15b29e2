"""A training run as picture and page: its losses with their smoothing, ‖ΔW‖ by layer over its steps, and every site.

Of a long run the curve keeps the least and the largest loss of each part, and the map evenly spaced lines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_fx.graphdiff.deltas.heatmaps import STYLE as HEAT
from lora_fx.graphdiff.deltas.heatmaps import HeatCell, drawing, heatmap, stacked_svg
from lora_fx.planning.render.page import Entries, entry, escape, page, scrolled
from lora_fx.text import count
from lora_fx.training.curves import Point, picked, smoothed, thinned, ticks
from lora_fx.training.history import History, RecordedSite, is_finite, words

STYLE = (
    HEAT
    + """
.heat .axis{fill:none;stroke:var(--line,#767676)}.heat .raw{fill:var(--dim,#595959);fill-opacity:.45}
.heat .smooth{fill:none;stroke:var(--added,#1a6b2d);stroke-width:2}
.heat rect.void{fill:var(--removed,#a3201d);fill-opacity:.15}
.heat .tick{text-anchor:end}.heat .below{text-anchor:middle}
.heat .curve{fill:none;stroke:var(--ink,#1b1b1b);stroke-width:1.5}
"""
)
_LEFT, _TOP, _WIDE, _HIGH = 60.0, 30.0, 620.0, 190.0
_MOST_POINTS = 1000
_MOST_COLUMNS = 12
_CELL = 56
NORMS = "‖ΔW‖ by layer"
Drawn = tuple[str, float, float]
"""SVG elements, their width and height."""


def record_svg(history: History) -> str:
    """Return both panels, one below the other."""
    return stacked_svg(_panels(history), f"training of {history.model}", STYLE)


def record_html(history: History, text: str) -> str:
    """Return the page: both panels, then a table of the sites of each layer; `text` is a sum for its head."""
    panels = zip(("loss", NORMS), _panels(history), strict=False)
    figures = "".join(
        entry(title, scrolled(drawing(drawn, f"picture of {title}"), f"picture of {title}")) for title, drawn in panels
    )
    by_layer: dict[str, list[int]] = {}
    for position, site in enumerate(history.sites):
        by_layer.setdefault(site.layer, []).append(position)
    entries = Entries()
    tables = "".join(
        entries.add(_table(history, layer, chosen, opened=k == 0), [history.sites[place].path for place in chosen])
        for k, (layer, chosen) in enumerate(by_layer.items())
    )
    void = "".join(f"<p><b>{escape(warning)}</b></p>" for warning in history.warnings())
    main = (
        f"<section><h2>Over the steps</h2>{figures}</section><section><h2>Sites</h2>{tables}{entries.told()}</section>"
    )
    header = f'<p class="sums">{escape(text)}</p>{void}'
    return page(f"Training of {history.model}", header, main, STYLE, entries.paths)


def _panels(history: History) -> list[Drawn]:
    drawn = [_losses(history)] if history.losses() else []
    return [*drawn, _norms(history)] if history.steps else drawn


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where steps and losses are in the panel."""

    first: int
    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return _LEFT + _WIDE * (step - self.first) / max(self.last - self.first, 1)

    def y(self, loss: float) -> float:
        share = (loss - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return _TOP + _HIGH * (1 - share)


def _losses(history: History) -> Drawn:
    points = history.losses()
    raw, mean = thinned(points, _MOST_POINTS), thinned(smoothed(points), _MOST_POINTS)
    values = [loss for _, loss in raw]
    scale = _Scale(points[0][0], points[-1][0], min(values, default=0.0), max(values, default=0.0))
    dots = "".join(
        f'<circle class="raw" cx="{scale.x(step):.1f}" cy="{scale.y(loss):.1f}" r="2.5">'
        f"<title>step {step:,}: {loss:.4g}</title></circle>"
        for step, loss in raw
    )
    line = f'<path class="smooth" d="{_path(mean, scale)}"/>' if mean else ""
    title = '<text class="title" x="4" y="16">loss</text>'
    return title + _void(points, scale) + _axes(scale) + dots + line, _LEFT + _WIDE + 30, _TOP + _HIGH + 26


def _path(points: Sequence[Point], scale: _Scale) -> str:
    return "M" + "L".join(f"{scale.x(step):.1f} {scale.y(value):.1f}" for step, value in points)


def _axes(scale: _Scale) -> str:
    bottom = _TOP + _HIGH
    parts = [f'<path class="axis" d="M{_LEFT:g} {_TOP:g}V{bottom:g}H{_LEFT + _WIDE:g}"/>']
    parts.append(f'<text class="tick" x="{_LEFT - 6:g}" y="{bottom + 18:g}">step</text>')
    for loss in ticks(scale.low, scale.high):
        parts.append(f'<text class="tick" x="{_LEFT - 6:g}" y="{scale.y(loss) + 4:.1f}">{loss:.4g}</text>')
    for step in ticks(scale.first, scale.last, 8):
        if step == int(step):
            parts.append(f'<text class="below" x="{scale.x(step):.1f}" y="{bottom + 18:g}">{int(step):,}</text>')
    return "".join(parts)


def _void(points: Sequence[Point], scale: _Scale) -> str:
    """Return what marks the steps whose losses are not finite."""
    parts = []
    width = max(_WIDE / max(len(points) - 1, 1), 2.0)
    marked = -math.inf
    for step, loss in points:
        x = scale.x(step) - width / 2
        if not math.isfinite(loss) and x >= marked + 1:  # of a long run not more than there are pixels
            said = escape(f"step {step:,}: {words(loss)}")
            parts.append(
                f'<rect class="void" x="{x:.1f}" y="{_TOP:g}" width="{width:.1f}" height="{_HIGH:g}">'
                f"<title>{said}</title></rect>"
            )
            marked = x
    first = next((point for point in points if not math.isfinite(point[1])), None)
    if first is not None:
        parts.append(f'<text x="{_LEFT + 8:g}" y="{_TOP + 10:g}">{words(first[1])} from step {first[0]:,}</text>')
    return "".join(parts)


def _norms(history: History) -> Drawn:
    cells = []
    for position in picked(len(history.steps), _MOST_COLUMNS):
        line = history.steps[position]
        for layer, norm in zip(history.layers, history.layer_norms(line), strict=True):
            value = norm if is_finite(norm) else None
            said = f"{layer}, step {line.step:,}: ‖ΔW‖ {words(norm)}"
            cells.append(HeatCell(layer, f"{line.step:,}", value, words(norm), said))
    return heatmap(cells, NORMS, _CELL)


def _table(history: History, layer: str, chosen: Sequence[int], opened: bool) -> str:
    names = ("site", "rule", "r", "scaling", "‖ΔW‖", "over the steps")
    head = "".join(f'<th scope="col"{" class=n" if k in (2, 3, 4) else ""}>{name}</th>' for k, name in enumerate(names))
    lines = [history.steps[position] for position in picked(len(history.steps), 60)]
    rows = "".join(_row(history.sites[k], [(line.step, line.norms[k]) for line in lines]) for k in chosen)
    body = scrolled(f"<table><tr>{head}</tr>{rows}</table>", f"sites of {layer}")
    last = dict(zip(history.layers, history.layer_norms(history.steps[-1]), strict=True)) if history.steps else {}
    facts = f"{count(len(chosen), 'site')}, ‖ΔW‖ {words(last.get(layer, 0.0))}"
    return entry(layer, body, facts, opened)


def _row(site: RecordedSite, points: Sequence[Point]) -> str:
    last = points[-1][1] if points else 0.0
    shown = words(last) if last else "0: not trained"
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in (str(site.r), f"{site.scaling:g}", shown))
    name, rule = escape(site.name), escape(site.rule)
    return f'<tr><th scope="row">{name}</th><td>{rule}</td>{numbers}<td>{_curve(points)}</td></tr>'


def _curve(points: Sequence[Point]) -> str:
    """Return a small picture of norms, from 0 to the largest."""
    finite = [(step, norm) for step, norm in points if math.isfinite(norm)]
    most = max((norm for _, norm in finite), default=0.0) or 1.0
    first, last = (points[0][0], points[-1][0]) if points else (0, 1)
    path = "L".join(
        f"{1 + 118 * (step - first) / max(last - first, 1):.1f} {23 - 22 * norm / most:.1f}" for step, norm in finite
    )
    label = f"‖ΔW‖ from {words(finite[0][1])} to {words(finite[-1][1])}" if finite else "no finite ‖ΔW‖"
    drawn = f'<path class="curve" d="M{path}"/>' if finite else ""
    return f'<svg class="heat" role="img" aria-label="{label}" width="120" height="24">{drawn}</svg>'
