"""A process that ends between two of its steps on the disk, as a kill ends it: nothing is cleaned up."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count

from lora_fx.errors import LoraFxError

_STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILLED = 77
_LONGEST = 300
"""Seconds."""


def fork() -> int:
    """Fork; a child that waits for ever, for a lock of a thread that it does not have, shows where and ends."""
    child = os.fork()
    if child == 0:
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)  # pytest's own timer has no thread here
        signal.alarm(_LONGEST)
    return child


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Do some work in a process of its own that ends before its so-manieth step; whether there were so many.

    Steps are what changes the disk: a file opened for writing, a rename, a deletion, a folder made, a sync.
    """
    child = fork()
    if child == 0:
        try:
            _before_step(step, lambda: os._exit(KILLED))
            work()
        except BaseException as error:
            print(repr(error), file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), "the work itself fails"
    return status == KILLED


def kills(work: Callable[[], object], before: Callable[[], object], every: int = 1) -> Iterator[int]:
    """Prepare, and do the work killed before a step; for each of its steps, or some of them.

    Args:
        work: what is killed.
        before: brings the disk into the state in which it begins.
        every: how many steps are gone on each time.
    """
    for step in count(0, every):
        before()
        if not killed_before(step, work):
            return
        yield step


def disturbed_before(step: int, work: Callable[[], object], disturb: Callable[[], object]) -> str:
    """Do some work in a process of its own, in which something happens before its so-manieth step.

    Returns `finished` if there were fewer steps, `done` if the work went on to its end, `refused` if it ended with an
    error of lora_fx, or what else it ended with.
    """
    reading, writing = os.pipe()
    child = fork()
    if child == 0:
        happened: list[bool] = []
        try:
            _before_step(step, lambda: (happened.append(True), disturb()))
            work()
            said = "done" if happened else "finished"
        except LoraFxError:
            said = "refused"
        except BaseException as error:
            said = repr(error)
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def _before_step(step: int, happen: Callable[[], object]) -> None:
    left, happened = [step], []

    def count_down() -> None:
        left[0] -= 1
        if left[0] < 0 and not happened:  # what happens takes steps too
            happened.append(True)
            happen()

    def seen(event: str, args: tuple[object, ...]) -> None:
        if event in _STEPS or (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
            count_down()

    for name in ("fsync", "pwrite", "copy_file_range"):
        setattr(os, name, _counted(getattr(os, name), count_down))
    sys.addaudithook(seen)


def _counted(function: Callable[..., object], count_down: Callable[[], None]) -> Callable[..., object]:
    def counted(*args: object) -> object:
        count_down()
        return function(*args)

    return counted
