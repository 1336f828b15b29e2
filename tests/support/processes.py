"""Several processes that share a gloo group: each does the same work, and what they return comes back.

Nobody waits for longer than a caller allows: neither for a fork server that does not answer, nor for a process that
does not come back; and a process ends itself then, should the one that waits be gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[Path], Any]
FORKS = sys.platform == "linux"
"""Elsewhere a fork of a process that has imported torch may not run."""
IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo", "tests.support.sharded"]
"""What is imported once for all of them, which takes most of the time of a process that imports it itself."""
GRACE = 20
"""Seconds in which the others may fail too, or come back, when one has failed: all else would be a wait for it."""


def in_processes(number: int, work: Work, folder: Path, seconds: float = 300, fresh: bool = False) -> list[Any]:
    """Return what a function of a module returns in each of so many processes, by rank.

    They are forks of one that has imported torch and lora_fx, if that can be; `fresh` ones import all by themselves, and
    walk over sets of words in an order of their own.

    Raises:
        RuntimeError: it failed in one of them, or one did not come back: with the traceback of each.
    """
    end = time.monotonic() + seconds
    forked = FORKS and not fresh
    context = mp.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(IMPORTED)
    processes: list[Any] = []
    try:
        with _server_until(end):
            for rank in range(number):
                process = context.Process(target=_run, args=(work, rank, number, folder, seconds))
                process.start()
                processes.append(process)
        late = _waited(processes, end)
    finally:
        _end_all(processes)
    codes = [process.exitcode for process in processes]
    if late or any(codes):
        told = (path.read_text() for path in sorted((*folder.glob("*.failed"), *folder.glob("*.stuck"))))
        raise RuntimeError("\n".join([f"not back: {late}, exit codes: {codes}", *told]))
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(number)]


@contextlib.contextmanager
def _server_until(end: float) -> Iterator[None]:
    """Let the fork server be ended again and again from some time on: who waits for it gets an error then."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(max(0.0, end - time.monotonic())):
            while not done.wait(0.1):
                _end_server()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    except (EOFError, OSError) as error:
        raise RuntimeError(f"no process was started in time: {type(error).__name__}: {error}") from error
    finally:
        done.set()
        watching.join()


def _end_server() -> None:
    pid: int | None = vars(forkserver)["_forkserver"]._forkserver_pid
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _waited(processes: Sequence[Any], end: float) -> list[int]:
    """Wait until all have ended, or for as long as is left; return which have not."""
    while waiting := [process.sentinel for process in processes if process.exitcode is None]:
        left = end - time.monotonic()
        if left <= 0:
            break
        connection.wait(waiting, left)
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE)
    return [rank for rank, process in enumerate(processes) if process.exitcode is None]


def _end_all(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
    if _waited(processes, time.monotonic() + 5):  # a server that does not say that they have ended
        _end_server()
        _waited(processes, time.monotonic() + 5)


def _run(work: Work, rank: int, number: int, folder: Path, seconds: float) -> None:
    stuck = (folder / f"{rank}.stuck").open("w")
    os.dup2(stuck.fileno(), 2)  # what torch says before it aborts, too
    faulthandler.dump_traceback_later(seconds / 2, file=stuck)
    if FORKS:
        signal.alarm(math.ceil(seconds) + GRACE)  # if nobody is left who would end it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
        torch.save(work(folder), folder / f"{rank}.result")
        if dist.is_initialized():
            dist.barrier()
        os._exit(0)  # gloo's threads, when the interpreter ends, have aborted a process that was done
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)  # the end of a group may wait for the others, which wait for this one
