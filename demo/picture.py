"""The demo's picture: the losses of both runs, and the table under them, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = {"lora_fx": "#1d7a50", "PEFT": "#a3541d"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _LINE = 720, 240, 48, 44, 19


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return for each step the mean of the last 20 losses."""
    return [sum(losses[max(0, k - 19) : k + 1]) / min(20, k + 1) for k in range(len(losses))]


def picture(losses: Mapping[str, Sequence[float]], table: str) -> str:
    """Return the picture: a curve for each run, each point the mean of its last 20 losses."""
    curves = {name: smoothed(run) for name, run in losses.items()}
    top = max(max(curve) for curve in curves.values())
    height = _TOP + _HEIGHT + 40 + _LINE * len(table.splitlines())
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-label="losses of lora_fx and PEFT, and what both cost" font-family="system-ui, sans-serif" '
        'font-size="12" fill="#1f2328">',
        '<rect width="100%" height="100%" rx="8" fill="#f6f8fa"/>',
        f'<text x="{_LEFT}" y="22" font-weight="bold">Training loss, mean of 20 steps</text>',
    ]
    for k in range(5):
        y = _TOP + _HEIGHT * k / 4
        drawn.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 16}" stroke="#d0d7de"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{top * (1 - k / 4):.2f}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        width = (_WIDTH - _LEFT - 16) / max(1, len(curve) - 1)
        at = [(_LEFT + width * k, _TOP + _HEIGHT * (1 - value / top)) for k, value in enumerate(curve)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        colour = COLOURS[name]
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(f'<text x="{_WIDTH - 160 + 72 * number}" y="22" fill="{colour}" font-weight="bold">{name}</text>')
    for row, line in enumerate(table.splitlines()):
        y = _TOP + _HEIGHT + 36 + _LINE * row
        drawn.append(
            f'<text x="{_LEFT}" y="{y}" xml:space="preserve" font-family="ui-monospace, Menlo, Consolas, monospace">'
            f"{escape(line)}</text>"
        )
    return "\n".join([*drawn, "</svg>\n"])
