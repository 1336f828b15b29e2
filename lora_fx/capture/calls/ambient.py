"""The state around a call that a graph depends on (grad mode, autocast), and a thread to set it up clean."""

import contextlib
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Autocast = tuple[str, bool, torch.dtype]


@dataclass(frozen=True, slots=True)
class AmbientState:
    """Grad mode and, for each kind of device in use, (device type, autocast enabled, autocast dtype)."""

    grad: bool
    autocast: tuple[Autocast, ...]
    devices: tuple[torch.device, ...]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Set the state up for the current thread."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
            for device in self.devices:
                if device.type == "cuda":
                    stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            yield


def ambient_state(devices: set[torch.device]) -> AmbientState:
    """Return the current thread's state, as far as it matters to tensors on these devices."""
    kinds = sorted({device.type for device in devices if torch.amp.is_autocast_available(device.type)} | {"cpu"})
    autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return AmbientState(torch.is_grad_enabled(), autocast, tuple(sorted(devices, key=str)))


def in_clean_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, run in a thread of its own.

    Modes, hooks on saved tensors and autocast are per thread: a capture in the middle of a checkpointed backward, or
    under somebody's dispatch mode, must neither be seen by them nor see them.
    """
    threads = (
        torch.get_num_threads()
    )  # their number is per thread in OpenMP, and other splits of a product round otherwise
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            torch.set_num_threads(threads)
            results.append(work())
        except BaseException as error:  # raised where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, name="lora_fx capture")
    thread.start()
    thread.join()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # else error, traceback and frame would hold one another
    return results[0]


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keep code that listens to garbage collections from being taken for a part of the forward."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class PythonRandomState:
    """The state of the global generators of Python and, where it is imported, numpy, taken now."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = _numpy_state()

    def restore(self) -> None:
        """Let both generators go on from here again."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def drawn_from(self) -> str | None:
        """Return whose generator has been drawn from since, or None."""
        if random.getstate() != self._python:
            return "Python's random"
        now = _numpy_state()
        if now is None or self._numpy is None:
            return None
        same = now[2:] == self._numpy[2:] and bool((now[1] == self._numpy[1]).all())
        return None if same else "numpy's random"


def _numpy_state() -> tuple[Any, ...] | None:
    if "numpy" not in sys.modules:
        return None
    state: tuple[Any, ...] = sys.modules["numpy"].random.get_state()
    return state


class RandomState:
    """The state of the generators on some devices, taken now."""

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"]

    def restore(self) -> None:
        """Let the generators go on from here again."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)

    def __eq__(self, other: Any) -> bool:
        same = torch.equal(self._cpu, other._cpu)
        pairs = zip(self._cuda, other._cuda, strict=True)
        return same and all(torch.equal(a, b) for (_, a), (_, b) in pairs)

    __hash__ = None  # type: ignore[assignment]
