"""What one more adapter costs on a model of many layers: `python benchmarks/adding.py` prints it.

A model of 1,001 small linears, adapters of rank 4 on all of them by modules, beside PEFT.  The first adapter, and the
tenth beside nine others: CPU seconds (the median of several models) and the Python functions that are called.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from switch import calls_of
from torch import nn

import lora_fx
from tests.support.performance import told

RANK, WIDTH = 4, 8
RULES = {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": RANK}}]}
HEADS = ("1,001 linears", "CPU seconds", "PEFT's CPU seconds", "Python calls", "PEFT's Python calls")
Steps = dict[str, Callable[[], object]]
"""What is measured, by the name of the adapter that it adds."""


def base(linears: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(linears)))


def ours(linears: int, last: int) -> Steps:
    """Return the calls that put adapters on one model, the first to the last."""
    plain = base(linears)
    return _steps(
        lambda: lora_fx.apply(plain, RULES, backend="modules"),
        lambda twin, name: lora_fx.add(twin, RULES, adapter=name),
        last,
    )


def peft(linears: int, last: int) -> Steps:
    """Return the same calls of PEFT."""
    plain = base(linears)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[str(number) for number in range(linears)])
    return _steps(
        lambda: get_peft_model(plain, config, adapter_name="a1"),
        lambda wrapped, name: wrapped.add_adapter(name, config),
        last,
    )


def _steps(first: Callable[[], nn.Module], another: Callable[[Any, str], object], last: int) -> Steps:
    made: list[nn.Module] = []
    others = {str(number): lambda name=f"a{number}": another(made[0], name) for number in range(2, last + 1)}
    return {"1": lambda: made.append(first()), **others}


def seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def counted(steps: Steps, names: Collection[str]) -> dict[str, int]:
    """Return how many Python functions some of the calls call, which are made one after the other."""
    calls = {}
    for name, step in steps.items():
        if name in names:
            calls[name] = calls_of(step)
        else:
            step()
    return calls


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--linears", type=int, default=1001)
    parser.add_argument("--last", type=int, default=10, help="the number of adapters")
    parser.add_argument("--repeats", type=int, default=5, help="0: count only")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*adapter", module="peft")
    spent = {kind: dict[str, list[float]]() for kind in (ours, peft)}
    for _ in range(options.repeats):
        for kind, times in spent.items():  # in turns, so that both see the same machine
            for name, step in kind(options.linears, options.last).items():
                times.setdefault(name, []).append(seconds(step))
    shown = {"1": "the first adapter", str(options.last): f"adapter {options.last}"}
    calls = {kind: counted(kind(options.linears, options.last), shown) for kind in spent}
    rows = []
    for name, what in shown.items():
        times = [f"{statistics.median(spent[kind][name]):.2f}" if options.repeats else "" for kind in spent]
        rows.append((what, *times, *(str(calls[kind][name]) for kind in spent)))
    told(options.write, "adding", [HEADS, *rows], keys=1)


if __name__ == "__main__":
    main()
