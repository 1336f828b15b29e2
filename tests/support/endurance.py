"""Long runs and many threads: what grows over thousands of steps, and what threads compute while others change the model."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import os
import random
import re
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSet, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.regions.install import regions
from lora_fx.regions.known import KNOWN
from tests.support import byhand
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
    tuples: int
    """That are freed, and kept by Python for later."""
    used: int
    """Bytes that the allocators of Python and of C have handed out, without those of such tuples."""
    resident: int
    """Bytes of memory, without what is freed and could be given back."""


Seen = TypeVar("Seen")


def held(model: nn.Module) -> Held:
    """Return what this process holds now; needs Linux's /proc and glibc."""
    tuples = free_tuples()
    gc.collect()  # which frees them too
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps it for later
    programs = {id(program) for _, _, region in regions(model) for program in region.block.programs}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files, objects = len(os.listdir("/proc/self/fd")), len(gc.get_objects())
    return Held(len(programs) + len(KNOWN), files, objects, tuples, used(), resident)


class _Mallinfo(ctypes.Structure):
    """glibc's `mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def used() -> int:
    """Return the bytes that the allocators of Python and of C have handed out and not got back.

    Memory is more: an allocator gives back whole arenas alone, and one that holds a single object still is none.
    """
    mallinfo: Any = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return sum(_python_says(r"# bytes in allocated blocks\s+=\s+([\d,]+)")) + int(found.uordblks + found.hblkhd)


def free_tuples() -> int:
    """Return how many freed tuples Python keeps for later: up to 2,000 of each length up to 20."""
    return sum(_python_says(r"(\d+) free \d+-sized PyTupleObject"))


def _python_says(pattern: str) -> list[int]:
    """Return the numbers in what Python writes of its memory, which it does to the standard error alone."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            sys._debugmallocstats()
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        return [int(number.replace(",", "")) for number in re.findall(pattern, file.read().decode())]


def kept_by(packages: Sequence[str]) -> Counter[str]:
    """Return how many objects there are of each class of some packages, and in what their modules and classes keep.

    That are dicts, lists, sets and caches of functions.
    """
    gc.collect()
    named = tuple(f"{package}." for package in packages)
    kinds = map(type, gc.get_objects())
    found = Counter(name for kind in kinds if (name := f"{kind.__module__}.{kind.__qualname__}").startswith(named))
    for module in [module for name, module in sys.modules.items() if f"{name}.".startswith(named)]:
        classes = [value for value in vars(module).values() if issubclass(type(value), type)]
        for owner in (module, *(one for one in classes if one.__module__ == module.__name__)):
            for name, value in list(vars(owner).items()):
                found[f"{owner.__name__}.{name}"] += _size(value)
    return found


def _size(value: object) -> int:
    value = value.__func__ if type(value) in (staticmethod, classmethod) else value
    if type(value) is functools._lru_cache_wrapper:
        return value.cache_info().currsize
    kept = dict | list | set | deque | MutableMapping | MutableSet | WeakSet
    return len(value) if issubclass(type(value), kept) else 0  # asks nothing of the value itself, which may warn


class Subject(NamedTuple):
    """What endures many steps."""

    model: nn.Module
    trained: Callable[[], Iterable[nn.Parameter]]
    change: Callable[[int], object]
    """Does, by the last digit of a step's number: add an adapter, use it, swap it, save, merge, go back, rename, drop."""


def adapted(folder: Path) -> Subject:
    """Return a model that lora_fx adapts."""
    tuned = lora_fx.apply(Gpt(16, 2), written("**.c_attn"), [INPUTS, (tokens(3, 7),)])
    for name in ("one", "two"):
        lora_fx.add(tuned, written("**.c_*"), adapter=name)
        lora_fx.save(tuned, folder / name, adapter=name)
        lora_fx.drop(tuned, name)

    def saves() -> None:
        lora_fx.save(tuned, folder / "kept")
        lora_fx.merge(tuned)

    turns: dict[int, Callable[[], object]] = {
        0: lambda: lora_fx.add(tuned, folder / "one", adapter="served"),
        1: lambda: lora_fx.use(tuned, ["default", "served"]),
        4: lambda: lora_fx.swap(tuned, folder / "two", adapter="served"),
        5: saves,
        7: lambda: lora_fx.use(tuned, "default"),
        8: lambda: lora_fx.rename(tuned, "served", "gone"),
        9: lambda: lora_fx.drop(tuned, "gone"),
    }
    return Subject(tuned, lambda: lora_fx.parameters(tuned), lambda step: turns.get(step % 10, int)())


def by_hand(folder: Path) -> Subject:
    """Return the same model, adapted by a few lines of torch, which the same is done with."""
    model = byhand.adapted()
    for name in ("one", "two"):
        byhand.add(model, None, name)
        byhand.save(model, folder / name, name)
        byhand.drop(model, name)

    def saves() -> None:
        byhand.save(model, folder / "kept", "default")
        byhand.merged(model)

    turns: dict[int, Callable[[], object]] = {
        0: lambda: byhand.add(model, folder / "one", "served"),
        1: lambda: byhand.use(model, "default", "served"),
        4: lambda: byhand.swap(model, folder / "two", "served"),
        5: saves,
        7: lambda: byhand.use(model, "default"),
        8: lambda: byhand.rename(model, "served", "gone"),
        9: lambda: byhand.drop(model, "gone"),
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Subject(model, lambda: trained, lambda step: turns.get(step % 10, int)())


def collected(folder: Path) -> Subject:
    """Return the first, with a full collection every twenty steps, which frees the tuples that Python keeps for later."""
    subject = adapted(folder)

    def change(step: int) -> None:
        subject.change(step)
        if step % 20 == 0:
            gc.collect()

    return subject._replace(change=change)


SUBJECTS = {"lora_fx": adapted, "lora_fx, `gc.collect()` every 20 steps": collected, "LoRA by hand": by_hand}


def long_run(
    steps: int,
    folder: Path,
    settled: int = SETTLED,
    start: Callable[[Path], Subject] = adapted,
    look: Callable[[nn.Module], Seen] = held,
) -> tuple[Seen, Seen]:
    """Train for so many steps with changing shapes, adapters added, swapped and dropped; return what is held.

    First after `settled` steps, then at the end.
    """
    torch.manual_seed(0)
    model, trained, change = start(folder)
    chance, first = random.Random(0), None
    for step in range(steps):
        if step == settled:
            first = look(model)
        change(step)
        model.train(step % 3 > 0)
        output = model(tokens(chance.randint(1, 4), chance.randint(2, 8)))
        if model.training:
            optimizer = torch.optim.SGD(trained(), lr=1e-3)
            output.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert first is not None, "the run is too short"
    return first, look(model)


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
