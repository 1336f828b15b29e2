"""A BenchReport as one page: a picture of ratios with their intervals, and the table that it shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_fx.bench.report import HEADS, BenchReport
from lora_fx.bench.subjects import LB
from lora_fx.bench.timing import FIT
from lora_fx.planning.render.page import entry, escape, page, preformatted, scrolled
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
    table = preformatted(escape(str(report), "\n"), "table")
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
    """Return (title, ratios) for time, where it was measured, and for the counters; the lower bound is left out."""
    names = [name for name in report.counts if name != LB]
    shown = []
    if report.timing is not None:
        ratios = [(name, report.timing.ratios[name]) for name in names]
        shown.append(("time", [Mark(name, time.ratio, time.low, time.high, time.text()) for name, time in ratios]))
    for number, title in enumerate(HEADS):
        values = [(name, report.relative(name)[number]) for name in names]
        finite = [(name, ratio) for name, ratio in values if math.isfinite(ratio)]
        shown.append((title, [Mark(name, ratio, ratio, ratio, f"{ratio:.3f}") for name, ratio in finite]))
    return shown


def _figure(title: str, marks: Sequence[Mark], void: bool) -> str:
    label = f"{title} over the lower bound: " + "; ".join(f"{mark.name} {mark.text}" for mark in marks)
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _ROW * len(marks) + 8
    drawn = _axis(title, marks, height) + "".join(_mark(mark, k, _scale(marks)) for k, mark in enumerate(marks))
    svg = (
        f'<svg class="ratios{" void" if void else ""}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label)}">{drawn}</svg>'
    )
    return entry(title, scrolled(svg, f"picture of {title}"))


def _scale(marks: Sequence[Mark]) -> tuple[float, float]:
    """Return the least and the largest ratio that a picture has room for; 1 is among them."""
    least, most = min(1.0, *(mark.low for mark in marks)), max(1.0, *(mark.high for mark in marks))
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
    middle, low, high = (_place(ratio, scale) for ratio in (mark.ratio, mark.low, mark.high))
    return (
        f"<g><title>{escape(f'{mark.name} {mark.text}')}</title>"
        f'<text x="4" y="{y + 4}">{escape(mark.name)}</text>'
        f'<path class="span" d="M{low:.1f} {y}H{high:.1f}"/><circle cx="{middle:.1f}" cy="{y}" r="4"/>'
        f'<text x="{_LEFT + _WIDTH + 12}" y="{y + 4}">{escape(mark.text)}</text></g>'
    )
