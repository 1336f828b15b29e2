"""Runs of many seeded cases in one process, with what the slowest took and by how much memory grew."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

PARTS = 2
"""A long run is so many tests, which as many processes can share."""


def long_run(part: int, default: int) -> range:
    """Return the seeds of a part of a long run: LORA_FX_FUZZ_CASES of them in all parts, from LORA_FX_FUZZ_FIRST on."""
    first, cases = (
        int(os.environ.get(f"LORA_FX_FUZZ_{name}", number)) for name, number in (("FIRST", 0), ("CASES", default))
    )
    return range(first + cases * part // PARTS, first + cases * (part + 1) // PARTS)


def run(case: Callable[[int], bool], seeds: range) -> str:
    """Return what a run of all seeds has shown.

    Args:
        case: raises what is wrong with a seed; returns whether what it made was read.
        seeds: of the cases.
    """
    case(seeds[0])  # what is made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, slowest, begun = 0, (0.0, 0), time.perf_counter()
    for seed in seeds:
        start = time.perf_counter()
        try:
            read += case(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        slowest = max(slowest, (time.perf_counter() - start, seed))
    milliseconds = 1000 * (time.perf_counter() - begun) / len(seeds)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return (
        f"{len(seeds):,} cases, {read:,} of them read, {milliseconds:.2f} ms each; slowest {slowest[0]:.3f} s (seed {slowest[1]}); "
        f"memory + {grown:.0f} MiB"
    )
