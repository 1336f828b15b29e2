"""Long runs and many threads: what grows over thousands of steps, and what threads compute while others change the model."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.regions.install import regions
from lora_fx.regions.known import KNOWN
from tests.support.faultcases import INPUTS, written
from tests.support.zoo import Gpt, tokens

SETTLED = 100
"""After so many steps nothing is to grow any more."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds."""

    graphs: int
    files: int
    """Open file descriptors."""
    objects: int
    """That Python's collector knows."""
    resident: int
    """Bytes of memory, without what is freed and could be given back."""


def held(tuned: nn.Module) -> Held:
    """Return what this process holds now; needs Linux's /proc."""
    gc.collect()
    if (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc keeps it for later
        give_back(0)
    programs = {id(program) for _, _, region in regions(tuned) for program in region.block.programs}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Held(len(programs) + len(KNOWN), len(os.listdir("/proc/self/fd")), len(gc.get_objects()), resident)


def long_run(steps: int, folder: Path, settled: int = SETTLED) -> tuple[Held, Held]:
    """Train for so many steps with changing shapes, adapters added, swapped and dropped; return what is held.

    First after `settled` steps, then at the end.
    """
    torch.manual_seed(0)
    tuned = lora_fx.apply(Gpt(16, 2), written("**.c_attn"), [INPUTS, (tokens(3, 7),)])
    for name in ("one", "two"):
        lora_fx.add(tuned, written("**.c_*"), adapter=name)
        lora_fx.save(tuned, folder / name, adapter=name)
        lora_fx.drop(tuned, name)
    chance, first = random.Random(0), None
    for step in range(steps):
        if step == settled:
            first = held(tuned)
        _change(tuned, step, folder)
        tuned.train(step % 3 > 0)
        output = tuned(tokens(chance.randint(1, 4), chance.randint(2, 8)))
        if tuned.training:
            optimizer = torch.optim.SGD(lora_fx.parameters(tuned), lr=1e-3)
            output.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert first is not None, "the run is too short"
    return first, held(tuned)


def _change(tuned: nn.Module, step: int, folder: Path) -> None:
    """Add an adapter, use it, swap it, save it, go back and drop it, over ten steps."""
    turn = step % 10
    if turn == 0:
        lora_fx.add(tuned, folder / "one", adapter="served")
    elif turn == 1:
        lora_fx.use(tuned, ["default", "served"])
    elif turn == 4:
        lora_fx.swap(tuned, folder / "two", adapter="served")
    elif turn == 5:
        lora_fx.save(tuned, folder / "kept")
        lora_fx.merge(tuned)
    elif turn == 7:
        lora_fx.use(tuned, "default")
    elif turn == 8:
        lora_fx.rename(tuned, "served", "gone")
    elif turn == 9:
        lora_fx.drop(tuned, "gone")


# -- threads


@dataclass(slots=True)
class Served:
    """What threads have computed while one changed the model."""

    calls: int = 0
    changes: int = 0
    mixed: list[str] = field(default_factory=list)
    """Outputs that are those of no state in which the model was, and errors."""


def threads_at_once(threads: int, changes: int, folder: Path) -> dict[str, Served]:
    """Let threads infer while one does something again and again; every output must be that of one state."""
    torch.manual_seed(0)
    base = Gpt(16, 2)
    rules = written("**.c_*")
    tuned = lora_fx.apply(base, rules, INPUTS).eval()
    for name in ("one", "two"):
        lora_fx.add(tuned, rules, adapter=name)
        with torch.no_grad():
            for parameter in lora_fx.parameters(tuned, name):
                parameter.mul_(3)
        lora_fx.save(tuned, folder / name, adapter=name)
    lora_fx.add(tuned, folder / "one", adapter="served")
    lora_fx.use(tuned, "served")

    def swaps(turn: int) -> None:
        lora_fx.swap(tuned, folder / ("one", "two")[turn % 2], adapter="served")

    def chooses(turn: int) -> None:
        lora_fx.use(tuned, ("one", "two")[turn % 2])

    def adds(turn: int) -> None:
        lora_fx.add(tuned, folder / "two", adapter=f"more{turn}")
        lora_fx.drop(tuned, f"more{turn}")

    def here(turn: int) -> None:
        with lora_fx.use(tuned, ("one", "two")[turn % 2]):
            tuned(*INPUTS)

    work: dict[str, Callable[[int], object]] = {
        "save": lambda turn: lora_fx.save(tuned, folder / "saved"),
        "merge": lambda turn: lora_fx.merge(tuned),
        "deepcopy": lambda turn: copy.deepcopy(tuned),
        "add and drop": adds,
        "`with` use, here": here,
        "use, for all": chooses,
        "swap": swaps,
    }
    states = [_output(tuned, name) for name in ("one", "two")]
    found = {}
    for name, change in work.items():
        lora_fx.use(tuned, "served" if name == "swap" else "one")
        found[name] = _served(tuned, threads, changes, change, states)
    return found


def _output(tuned: nn.Module, adapter: str) -> Tensor:
    with torch.no_grad(), lora_fx.use(tuned, adapter):
        return tuned(*INPUTS)  # type: ignore[no-any-return]


def _served(
    tuned: nn.Module, threads: int, changes: int, change: Callable[[int], object], states: list[Tensor]
) -> Served:
    served, stop, counting = Served(), threading.Event(), threading.Lock()

    def infer() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            try:
                with torch.no_grad():
                    output = tuned(*INPUTS)
                wrong = None if any(torch.allclose(output, state, 1e-5, 1e-6) for state in states) else "a mixture"
            except Exception as error:
                wrong = repr(error)
            with counting:
                served.calls += 1
                served.mixed += [] if wrong is None else [wrong]

    for _ in running([threading.Thread(target=infer) for _ in range(threads)], stop):
        for turn in range(changes):
            change(turn)
            served.changes += 1
    return served


def running(threads: list[threading.Thread], stop: threading.Event) -> Iterator[None]:
    """Yield once, while threads run; then end them."""
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
