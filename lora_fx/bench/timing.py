"""The protocol of timing: interleaved in one process, in rotating order, and compared within rounds.

A round runs every subject once; the statistic is the median over rounds of the ratio to the lower bound of the same
round, with a bootstrap interval.  The lower bound runs twice: where its two copies differ by more than a hundredth, the
machine was not fit to measure anything, and the run is void.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lora_fx.bench.counters import Work, frozen_heap, no_collection
from lora_fx.progress.steps import step

WARM_UPS = 3
CONTENDED = 1.15
"""Wall time over processor time above which a round counts as disturbed by other processes."""
FIT = 0.01
"""How far the ratio of the two copies of the lower bound may lie from 1."""
RESAMPLES, SEED = 2000, 0

Spent = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds of every subject in every round, [rounds, subjects]."""

    names: tuple[str, ...]
    wall: Spent
    processor: Spent
    on_processor: bool = True
    """Whether the work is done by the processor, whose time then shows whether it was alone."""

    def calm(self) -> NDArray[np.bool_]:
        """Return which rounds went undisturbed; on other devices that cannot be seen, and all count."""
        if not self.on_processor:
            return np.ones(len(self.wall), dtype=bool)
        return np.asarray(np.all(self.wall <= CONTENDED * self.processor, axis=1), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The time of a subject over the lower bound's."""

    ratio: float
    """Median of the paired ratios of wall time."""
    low: float
    high: float
    """Its 95 % interval."""
    least: float
    """Shortest time over the lower bound's shortest."""
    processor: float
    """Median of the paired ratios of processor time."""
    seconds: float
    """Median of the wall time itself."""

    def text(self) -> str:
        """Return `1.034 [1.031, 1.037]`."""
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Timing:
    """What came out of the rounds."""

    ratios: dict[str, Ratio]
    """By subject; the reference's own is 1."""
    rounds: int
    discarded: int
    """Rounds that other processes disturbed."""
    control: Ratio
    """Of the second copy of the lower bound to the first."""
    void: str
    """Why the run says nothing; empty if it does say something."""


def fit(measure: Callable[[], Timing], attempts: int) -> Timing:
    """Return the first timing of so many that is not void, or else the last."""
    if attempts < 1:
        raise ValueError(f"attempts is {attempts}; it must be at least 1")
    timing = measure()
    for _ in range(attempts - 1):
        if timing.void:
            timing = measure()
    return timing


def timed(
    steps: Mapping[str, Work],
    rounds: int,
    warm_ups: int = WARM_UPS,
    device: str = "cpu",
) -> Rounds:
    """Return the times of the steps, each run once per round.

    Args:
        steps: by name of the subject.
        rounds: at least 1.
        warm_ups: rounds that are run before and not timed.
        device: type of the device that does the work; it is waited for before a clock is read.
    """
    names = tuple(steps)
    spent = np.zeros((2, rounds, len(names)))
    for _ in range(warm_ups):
        for work in steps.values():
            work()
    with frozen_heap(), step("timing", rounds, "rounds", share=rounds) as doing:
        for number in range(rounds):
            with no_collection():
                for index in order(number, len(names)):
                    spent[:, number, index] = _clocked(steps[names[index]], device)
            doing.advance()
    return Rounds(names, spent[0], spent[1], device == "cpu")


def order(number: int, subjects: int) -> Sequence[int]:
    """Return in which order a round runs the subjects: each is first, and last, equally often."""
    rotated = [(number // 2 + index) % subjects for index in range(subjects)]
    return rotated[::-1] if number % 2 else rotated


def _clocked(step: Work, device: str) -> tuple[float, float]:
    """Return wall time and processor time of a step."""
    _wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    step()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - processor


def _wait(device: str) -> None:
    """Let what was sent to a device end."""
    if device not in ("cpu", "meta"):
        torch.accelerator.synchronize()


def summarised(rounds: Rounds, reference: str, control: str) -> Timing:
    """Return the ratios of all subjects to the reference.

    Args:
        rounds: as `timed` returns them.
        reference: name of the lower bound.
        control: name of its second copy.
    """
    calm = rounds.calm()
    kept = calm if calm.any() else np.ones_like(calm)
    first = rounds.names.index(reference)
    ratios = {name: _ratio(rounds, kept, index, first) for index, name in enumerate(rounds.names)}
    other = ratios.pop(control)
    return Timing(ratios, len(calm), int((~calm).sum()), other, _void(other, calm))


def _void(control: Ratio, calm: NDArray[np.bool_]) -> str:
    if not calm.any():
        return "other processes disturbed every round"
    if abs(control.ratio - 1) > FIT:
        return f"two copies of the lower bound differ: {control.text()}, where 1 ± {FIT} is asked for"
    return ""


def _ratio(rounds: Rounds, kept: NDArray[np.bool_], index: int, first: int) -> Ratio:
    """Return the ratio of one subject to another in the rounds that are kept."""
    wall, base = rounds.wall[kept, index], rounds.wall[kept, first]
    low, high = interval(wall / base)
    return Ratio(
        ratio=float(np.median(wall / base)),
        low=low,
        high=high,
        least=float(wall.min() / base.min()),
        processor=float(np.median(rounds.processor[kept, index] / rounds.processor[kept, first])),
        seconds=float(np.median(wall)),
    )


def interval(values: Spent) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median, the same for the same values."""
    drawn = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), (2.5, 97.5))
    return float(low), float(high)
