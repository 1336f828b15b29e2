"""Threads that infer while others swap values and choose adapters: each result is that of one state, never a mixture."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.twoadapters import BACKENDS, BOTH, given, two
from tests.support.zoo import randomise_

CHOICES = ("a", ["a", "b"], None)
X = given()


def saved(folder: Path) -> list[Path]:
    """Return two directories with other values for the adapter "a"."""
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tuned = lora_fx.apply(lora_fx.remove(two()), BOTH, backend="modules")
        randomise_(tuned)
        with torch.no_grad():
            for parameter in lora_fx.parameters(tuned):
                parameter.mul_(seed)
        lora_fx.save(tuned, folder / str(seed))
        paths.append(folder / str(seed))
    return paths


@torch.no_grad()
def output(tuned: nn.Module) -> Tensor:
    return tuned(X).clone()


def right(tuned: nn.Module, paths: list[Path]) -> dict[tuple[int, str], Tensor]:
    """Return what each state computes, while nobody else is at work."""
    results = {}
    for number, path in enumerate(paths):
        lora_fx.swap(tuned, path, adapter="a")
        for choice in CHOICES:
            with lora_fx.use(tuned, choice):
                results[number, str(choice)] = output(tuned)
    return results


def together(*works: Callable[[], None]) -> None:
    """Run each again and again, in a thread of its own, until the first has run so often."""
    done, errors = threading.Event(), []

    def run(work: Callable[[], None], first: bool) -> None:
        try:
            for number in range(1_000_000):
                if done.is_set() or (first and number == 150):
                    break
                work()
        except BaseException as error:
            errors.append(error)
        finally:
            if first or errors:
                done.set()

    threads = [threading.Thread(target=run, args=(work, not number)) for number, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@BACKENDS
def test_what_is_computed_while_another_swaps_and_a_third_chooses_is_one_states(inputs, tmp_path):
    tuned, paths = two(inputs), saved(tmp_path)
    results = right(tuned, paths)
    wrong, number = [], iter(range(1_000_000))

    def infer() -> None:
        now = output(tuned)
        wrong.extend([now] if not any(torch.equal(now, one) for one in results.values()) else [])

    def infer_with_both() -> None:
        with lora_fx.use(tuned, ["a", "b"]):
            now = output(tuned)
        of_both = [results[0, str(CHOICES[1])], results[1, str(CHOICES[1])]]
        wrong.extend([now] if not any(torch.equal(now, one) for one in of_both) else [])

    def swap() -> None:
        lora_fx.swap(tuned, paths[next(number) % 2], adapter="a")

    def choose() -> None:
        lora_fx.use(tuned, CHOICES[next(number) % 3])

    together(infer, infer_with_both, swap, choose)
    assert wrong == []
    assert not torch.equal(results[0, "a"], results[1, "a"])


def test_a_mixture_and_an_error_in_a_thread_are_seen(tmp_path):
    tuned, paths = two(), saved(tmp_path)
    results = right(tuned, paths)
    with torch.no_grad():  # half of a swap
        next(iter(lora_fx.parameters(tuned))).mul_(2)
    lora_fx.use(tuned, "a")
    assert not any(torch.equal(output(tuned), one) for one in results.values())

    def failing() -> None:
        raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        together(lambda: time.sleep(0.01), failing)
