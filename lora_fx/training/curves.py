"""Curves: fewer points for long runs, smoothing, and curves as text.  The same points always give the same curve."""

import itertools
import math
from collections.abc import Sequence

_EIGHTHS = "▁▂▃▄▅▆▇█"
_GAP = "×"
"""In the place of a value that is not finite."""
Point = tuple[int, float]
"""Step and value."""


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most so many of the points, those that are not finite left out: of each part the least and the largest.

    So a single peak is in the picture of a run of any length.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= most:
        return finite
    kept: list[Point] = []
    for part in parts(finite, most // 2):
        least, largest = min(part, key=_value), max(part, key=_value)
        kept += sorted({least, largest})
    return kept


def _value(point: Point) -> float:
    return point[1]


def parts(points: Sequence[Point], number: int) -> list[Sequence[Point]]:
    """Return the points in so many parts of one size, or one less; as many as there are points at most."""
    number = min(number, len(points))
    ends = [k * len(points) // number for k in range(number + 1)] if number else [0]
    return [points[start:end] for start, end in itertools.pairwise(ends)]


def picked(number: int, most: int) -> list[int]:
    """Return at most so many positions out of a number of them, evenly spaced, the first and the last among them."""
    if number <= most:
        return list(range(number))
    return [round(k * (number - 1) / (most - 1)) for k in range(most)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return an exponential mean over about a twentieth of the finite points, at least three, without a bias at first.

    With β = 1 - 2 / (n + 1) the mean after t points is Σ β^(t-k) x_k / Σ β^(t-k) (Kingma and Ba 2014, Adam, §3).
    """
    finite = [point for point in points if math.isfinite(point[1])]
    beta = 1 - 2 / (max(3, len(finite) // 20) + 1)
    means, total, weight = [], 0.0, 0.0
    for step, value in finite:
        total, weight = beta * total + value, beta * weight + 1
        means.append((step, total / weight))
    return means


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as one line of blocks; of more values than the width, the mean of each part."""
    (line,) = chart(values, width, 1)
    return line


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """Return values as lines of blocks, the top one first; all of one height where they are equal.

    A part with a value that is not finite is a ×.
    """
    means = [_mean([value for _, value in part]) for part in parts(list(enumerate(values)), width)]
    finite = [value for value in means if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    levels = [_level(value, low, high, 8 * height) for value in means]
    return ["".join(_block(level, row) for level in levels) for row in reversed(range(height))]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _level(value: float, low: float, high: float, levels: int) -> int | None:
    """Return how many eighths of a line are filled, at least one; None for a value that is not finite."""
    if not math.isfinite(value):
        return None
    share = (value - low) / (high - low) if high > low else 0.0
    return 1 + round(share * (levels - 1))


def _block(level: int | None, row: int) -> str:
    if level is None:
        return _GAP if row == 0 else " "
    filled = min(max(level - 8 * row, 0), 8)
    return _EIGHTHS[filled - 1] if filled else " "


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between two, at most so many."""
    if not high > low or not math.isfinite(high - low):
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    first = math.ceil(low / step)
    return [k * step for k in range(first, first + most + 1) if k * step <= high]
