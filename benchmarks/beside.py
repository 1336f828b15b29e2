"""What benchmarks of training steps share: options, counts and times beside a base, as cells of a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lora_fx.bench.counters import Counts, counted
from lora_fx.bench.subjects import AGAIN, LB, Subject
from lora_fx.bench.timing import Timing, fit, summarised, timed
from lora_fx.text import scaled

BATCH = {"bert": (8, 128), "llama": (4, 256)}
"""How many tokens each model of `models_asked` is given, if nothing else is asked for."""
_UNITS = {"flops": "FLOP", "saved_bytes": "B", "peak_bytes": "B"}


def asked(text: str | None, threads: int = 1) -> argparse.ArgumentParser:
    """Return a parser of the options that all have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of timing; 0 counts only")
    parser.add_argument("--attempts", type=int, default=1)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    return parser


def models_asked(parser: argparse.ArgumentParser) -> None:
    """Let a parser take which models are measured, and of which sizes."""
    parser.add_argument("--models", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--width", type=int, help="another one: to try the command")
    parser.add_argument("--shape", nargs=2, type=int, metavar=("BATCH", "LENGTH"), help="of inputs: to try it")


def compared(
    steps: Mapping[str, Callable[[], object]], reference: str, control: str, options: argparse.Namespace
) -> Timing:
    """Return the paired times of steps over the reference's, and say on stderr what the control gave."""
    timing = fit(lambda: summarised(timed(steps, options.rounds), reference, control), options.attempts)
    print(f"A/A {timing.control.text()} {timing.void}", file=sys.stderr, flush=True)
    return timing


def sizes(counts: Counts, figures: Sequence[str]) -> tuple[str, ...]:
    """Return figures (names of fields of Counts) with their units."""
    return tuple(scaled(getattr(counts, figure), _UNITS[figure]) for figure in figures)


def over(counts: Counts, base: Counts, figures: Sequence[str]) -> tuple[str, ...]:
    """Return figures over those of a base."""
    return tuple(f"{getattr(counts, figure) / getattr(base, figure):.3f}" for figure in figures)


def lines(
    subjects: Iterable[Subject],
    where: Sequence[str],
    names: Sequence[str],
    figures: Sequence[str],
    options: argparse.Namespace,
) -> Iterator[tuple[str, ...]]:
    """Yield a line for the frozen base among the subjects, and one for each of the others that is named, over it."""
    known = {subject.name: subject for subject in subjects}
    for subject in known.values():
        subject.step()
        subject.step()
    counts = {name: counted(s.step, s.forward, s.own()) for name, s in known.items() if name != AGAIN}
    ratios = {}
    if options.rounds:
        timing = compared({name: subject.step for name, subject in known.items()}, LB, AGAIN, options)
        ratios = {} if timing.void else timing.ratios
    spent = f"{ratios[LB].seconds:.2f} s" if ratios else ""
    yield (*where, "frozen base", spent, *sizes(counts[LB], figures))
    for name in names:
        yield (*where, name, ratios[name].text() if ratios else "", *over(counts[name], counts[LB], figures))
