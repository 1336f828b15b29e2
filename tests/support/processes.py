"""Several processes that share a gloo group: each does the same work, and what they return comes back."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
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


def in_processes(number: int, work: Work, folder: Path, seconds: float = 300, fresh: bool = False) -> list[Any]:
    """Return what a function of a module returns in each of so many processes, by rank.

    They are forks of one that has imported torch and lora_fx, if that can be; `fresh` ones import all by themselves, and
    walk over sets of words in an order of their own.

    Raises:
        RuntimeError: it failed in one of them, or one did not come back: with the traceback of each.
    """
    forked = FORKS and not fresh
    context = mp.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(IMPORTED)
    processes = [context.Process(target=_run, args=(work, rank, number, folder, seconds)) for rank in range(number)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    codes = [process.exitcode for process in processes]
    if late or any(codes):
        told = (path.read_text() for path in sorted((*folder.glob("*.failed"), *folder.glob("*.stuck"))))
        raise RuntimeError("\n".join([f"not back: {late}, exit codes: {codes}", *told]))
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(number)]


def _run(work: Work, rank: int, number: int, folder: Path, seconds: float) -> None:
    stuck = (folder / f"{rank}.stuck").open("w")
    os.dup2(stuck.fileno(), 2)  # what torch says before it aborts, too
    faulthandler.dump_traceback_later(seconds / 2, file=stuck)
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
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
