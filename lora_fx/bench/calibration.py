"""Measure what products cost on this machine, for the choice between factored and merged (see `contraction`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_fx.adapters.fused import contraction, machine
from lora_fx.adapters.fused.machine import Key, Machine, Products
from lora_fx.bench.counters import frozen_heap, no_collection
from lora_fx.text import columns, count

DTYPES = ("float32", "float64")
ROUNDS = 16
ROWS, WIDTH, RANKS, PLANE = 2048, 1024, (8, 64), 4096
"""Of the products that are measured; the matrices are larger than the caches of a core."""
SHOWN_WIDTHS, SHOWN_RANKS = (768, 2048, 4096), (8, 16, 64)
_TINY = 8


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, and where it is kept."""

    path: Path
    machines: Mapping[Key, Machine]

    def __str__(self) -> str:
        devices = dict.fromkeys(device for device, *_ in self.machines)
        return "\n\n".join([*map(self._of_device, devices), f"written to {self.path}"])

    def _of_device(self, device: str) -> str:
        machines = {key: each for key, each in self.machines.items() if key[0] == device}
        heads = ("", "wide", *(f"rank {rank}" for rank in RANKS), "traffic", "new memory", "a call")
        costs = [(_name(key), *_costs(each)) for key, each in machines.items()]
        sizes = ["", *(f"d={width} r={rank}" for width in SHOWN_WIDTHS for rank in SHOWN_RANKS)]
        least = [_crossovers(key, each) for key, each in machines.items()]
        parts = (
            device,
            columns([heads, *costs]),
            "W + s · B A is formed (merged) from so many tokens on, in layers d × d:",
            columns(list(zip(sizes, *least, strict=True))),
        )
        return "\n\n".join(parts)


def _crossovers(key: Key, each: Machine) -> list[str]:
    size = _dtype(key[1]).itemsize
    sites = [Products(width, width, rank, size) for width in SHOWN_WIDTHS for rank in SHOWN_RANKS]
    found = (contraction.crossover(each, site) for site in sites)
    return [_name(key), *("never" if rows is None else f"{rows:,}" for rows in found)]


def _name(key: Key) -> str:
    return f"{key[1]}, {count(key[2], 'thread')}"


def _costs(each: Machine) -> Iterator[str]:
    yield f"{1e-9 / each.wide:.1f} GFLOP/s"
    yield from (f"{1e-9 / (each.wide * (1 + each.knee / rank)):.1f} GFLOP/s" for rank in RANKS)
    yield from (f"{1e-9 / cost:.1f} GB/s" if cost else "nothing" for cost in (each.traffic, each.fresh))
    yield f"{1e6 * each.call:.1f} µs"


def calibrate(file: Path | None = None, threads: Sequence[int] | None = None) -> Calibration:
    """Return what products cost on this machine, and write it for all later processes; takes some seconds.

    Args:
        file: where to write; None: where it is looked for.
        threads: numbers of threads to measure with; None: one, and as many as are used now.
    """
    path = machine.path() if file is None else file
    numbers = sorted({1, torch.get_num_threads()}) if threads is None else threads
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {
        (machine.device_name(kind), dtype, number): _measured(kind, dtype, number)
        for kind in kinds
        for dtype in DTYPES
        for number in numbers
    }
    machine.write(path, found)
    contraction.forget()
    return Calibration(path, found)


def _measured(kind: str, dtype: str, threads: int) -> Machine:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with frozen_heap(), no_collection(), torch.no_grad():
            return _machine(kind, _dtype(dtype))
    finally:
        torch.set_num_threads(before)


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[name]


def _machine(kind: str, dtype: torch.dtype) -> Machine:
    """Return the five numbers, each from the products that they are to predict."""

    def filled(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=dtype, device=kind)

    x, weight, tiny = filled(ROWS, WIDTH), filled(WIDTH, WIDTH), filled(_TINY, _TINY)
    factors = [filled(rank, WIDTH) for rank in RANKS]
    left, right, plane = filled(PLANE, RANKS[0]), filled(RANKS[0], WIDTH), filled(PLANE, WIDTH)
    works = [
        lambda: torch.mm(tiny, tiny),
        lambda: torch.mm(x, weight.t()),
        *(lambda factor=factor: torch.mm(factor, x.t()) for factor in factors),
        lambda: torch.addmm(plane, left, right, alpha=1e-3, out=plane),
        lambda: torch.addmm(plane, left, right, alpha=1e-3),
    ]
    call, whole, *thin, added, formed = _taken(works, kind)
    wide = (whole - call) / (2 * ROWS * WIDTH * WIDTH)
    knees = [
        rank * ((each - call) / (2 * ROWS * WIDTH * rank * wide) - 1) for rank, each in zip(RANKS, thin, strict=True)
    ]
    traffic = (added - call - 2 * plane.numel() * RANKS[0] * wide) / (2 * plane.nbytes)
    found = (wide, statistics.mean(knees), traffic, (formed - added) / plane.nbytes, call)
    return Machine(*(max(0.0, each) for each in found))  # a difference of two times can fall below 0


def _taken(works: Sequence[Callable[[], object]], kind: str) -> list[float]:
    """Return what each work takes: the median of the faster half of the rounds, as other processes only add to it.

    All are run in each round: in training too, others run between them.
    """
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS + 1):
        for times, work in zip(spent, works, strict=True):
            times.append(_clocked(work, kind))
    return [statistics.quantiles(times[1:], n=4)[0] for times in spent]


def _clocked(work: Callable[[], object], kind: str) -> float:
    _wait(kind)
    start = time.perf_counter()
    work()
    _wait(kind)
    return time.perf_counter() - start


def _wait(kind: str) -> None:
    if kind != "cpu":
        torch.accelerator.synchronize()
