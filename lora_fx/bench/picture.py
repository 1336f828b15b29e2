"""A BenchReport as one page: a picture of ratios with their intervals, and the table that it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lora_fx.bench.report import HEADS, BenchReport
from lora_fx.bench.subjects import LB
from lora_fx.bench.timing import FIT
from lora_fx.planning.render.page import entry, page, preformatted, scrolled
from lora_fx.text import count

STYLE = """
.ratios text{font:12px system-ui,sans-serif;fill:var(--ink,#1b1b1b)}.ratios .title{font:bold 14px system-ui,sans-serif}
.ratios .one{stroke:var(--line,#767676);stroke-width:1.5}.ratios .fit{fill:var(--line,#767676);fill-opacity:.18}
.ratios .span{stroke:var(--ink,#1b1b1b);stroke-width:2}.ratios circle{fill:var(--added,#1a6b2d)}
.ratios.void circle{fill:var(--removed,#a3201d)}
"""
_LEFT, _WIDTH, _RIGHT, _ROW, _TOP = 140, 480, 170, 26, 34


@dataclass(frozen=True, slots=True)
class Mark:
    """A ratio to LB in a picture."""

    name: str
    ratio: float
    low: float
    high: float
    text: str


def report_html(report: BenchReport) -> str:
    """Return the page."""
    table = preformatted(escape(str(report)), "table")
    figures = "".join(
        _figure(title, marks, title == "time" and bool(report.void)) for title, marks in panels(report) if marks
    )
    main = f"<section><h2>Over the lower bound</h2>{figures}</section><section><h2>Numbers</h2>{table}</section>"
    setting, machine = report.setting, report.machine
    used = f"{count(machine.threads, 'thread')} on {count(machine.cores, 'core')}"
    where = f"{machine.processor}, {used}, torch {machine.torch}"
    void = f"<p><b>VOID: {escape(report.void)}</b></p>" if report.void else ""
    header = f'<p class="sums">{escape(", ".join(setting.inputs))}; {escape(setting.dtype)}; {escape(where)}.</p>{void}'
    return page(f"A training step of {setting.model} by {setting.rules}", header, main, STYLE)


def panels(report: BenchReport) -> list[tuple[str, list[Mark]]]:
    """Return (title, ratios) for time, where it was measured, and for each counter."""
    names = [name for name in report.counts if name != LB]
    found = []
    if report.timing is not None:
        ratios = [(name, report.timing.ratios[name]) for name in names]
        found.append(("time", [Mark(name, each.ratio, each.low, each.high, each.text()) for name, each in ratios]))
    for number, title in enumerate(HEADS):
        values = [(name, report.relative(name)[number]) for name in names]
        finite = [(name, each) for name, each in values if math.isfinite(each)]
        found.append((title, [Mark(name, each, each, each, f"{each:.3f}") for name, each in finite]))
    return found


def _figure(title: str, marks: Sequence[Mark], void: bool) -> str:
    label = f"{title} over the lower bound: " + "; ".join(f"{each.name} {each.text}" for each in marks)
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _ROW * len(marks) + 8
    drawn = _axis(title, marks, height) + "".join(_mark(each, k, _scale(marks)) for k, each in enumerate(marks))
    svg = (
        f'<svg class="ratios{" void" if void else ""}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label)}">{drawn}</svg>'
    )
    return entry(title, scrolled(svg, f"picture of {title}"))


def _scale(marks: Sequence[Mark]) -> tuple[float, float]:
    """Return the least and the largest ratio that a picture has room for; 1 is among them."""
    least, most = min(1.0, *(each.low for each in marks)), max(1.0, *(each.high for each in marks))
    margin = 0.05 * max(most - least, 0.05)
    return least - margin, most + margin


def _place(ratio: float, scale: tuple[float, float]) -> float:
    return _LEFT + _WIDTH * (ratio - scale[0]) / (scale[1] - scale[0])


def _axis(title: str, marks: Sequence[Mark], height: int) -> str:
    scale = _scale(marks)
    one = _place(1, scale)
    left, right = (max(_LEFT, min(_LEFT + _WIDTH, _place(1 + sign * FIT, scale))) for sign in (-1, 1))
    fit = (
        f'<rect class="fit" x="{left:.1f}" y="{_TOP - 8}" width="{right - left:.1f}" height="{height - _TOP}"/>'
        if title == "time"
        else ""
    )
    line = f'<path class="one" d="M{one:.1f} {_TOP - 8}V{height - 8}"/>'
    return f'<text class="title" x="4" y="16">{escape(title)}</text><text x="{one - 8:.1f}" y="18">LB</text>{fit}{line}'


def _mark(mark: Mark, row: int, scale: tuple[float, float]) -> str:
    y = _TOP + _ROW * row + 8
    middle, low, high = (_place(each, scale) for each in (mark.ratio, mark.low, mark.high))
    return (
        f"<g><title>{escape(f'{mark.name} {mark.text}')}</title>"
        f'<text x="4" y="{y + 4}">{escape(mark.name)}</text>'
        f'<path class="span" d="M{low:.1f} {y}H{high:.1f}"/><circle cx="{middle:.1f}" cy="{y}" r="4"/>'
        f'<text x="{_LEFT + _WIDTH + 12}" y="{y + 4}">{escape(mark.text)}</text></g>'
    )
