"""What changing adapters costs: `python benchmarks/switch.py` prints it; times are of this machine.

A decoder of 24 layers with adapters of rank 8 on its 168 linears, which runs as graphs: what `use`, `swap` and a
context of `rows` take, in milliseconds (the median of many), torch operations and Python calls; and how often something
was captured, or compiled by torch.compile, in a forward after each of them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.adapters.dicts import KEPT_TARGETS
from lora_fx.regions.install import regions
from tests.support.performance import told

RANK, WORDS = 8, 1000
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RULES = {"version": 1, "rules": [{"match": {"name": f"**.{{{','.join(LINEARS)}}}"}, "lora": {"r": RANK}}]}
AGAIN = "swap, of the same directory again"
HEADS = ("what", "sites", "ms", "torch operations", "Python calls", "captures", "compilations")


def base(layers: int, width: int) -> nn.Module:
    """Return the frozen decoder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def calls_of(step: Callable[[], object]) -> int:
    """Return the number of Python functions that a step calls, without those that end objects of before."""
    number = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal number
        number += event == "call"

    gc.disable()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return number


class Bench:
    """A model with two adapters, which runs as it is and compiled."""

    def __init__(self, layers: int, width: int, folder: Path) -> None:
        self.ids = torch.randint(0, WORDS, (2, 8), generator=torch.Generator().manual_seed(1))
        self.model = lora_fx.apply(base(layers, width), RULES, {"input_ids": self.ids})
        lora_fx.rename(self.model, "default", "a")
        lora_fx.add(self.model, RULES, adapter="b", trainable=False)
        self.state, self.folder = self._other(layers, width, folder), folder
        self.sites = lora_fx.list_adapters(self.model)["a"].sites
        self.compilations = 0
        self.compiled: Any = torch.compile(self.model, backend=self._compiled)

    def _other(self, layers: int, width: int, folder: Path) -> dict[str, Tensor]:
        """Save an adapter of the same sites, and return its state."""
        other = lora_fx.apply(base(layers, width), RULES, backend="modules")
        for parameter in lora_fx.parameters(other):
            nn.init.normal_(parameter, std=0.02)
        lora_fx.save(other, folder)
        return dict(lora_fx.adapter_state(other))

    def _compiled(self, graph: Any, _inputs: object) -> Any:
        self.compilations += 1
        return graph.forward

    @torch.no_grad()
    def forward(self) -> None:
        self.model(self.ids)
        self.compiled(self.ids)

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return what is measured; each call chooses something else than the one before."""
        turns = {"use": 0, "swap": 0}

        def use() -> None:
            turns["use"] += 1
            lora_fx.use(self.model, ("a", "b")[turns["use"] % 2])

        def use_here() -> None:
            with lora_fx.use(self.model, "b"):
                pass

        def rows() -> None:
            with lora_fx.rows(self.model, ["a", "b"]):
                pass

        def directory() -> None:
            self.model.__dict__.pop(KEPT_TARGETS, None)
            lora_fx.swap(self.model, self.folder, adapter="b")

        return {
            "use": use,
            "use, in a with": use_here,
            "swap, of a state": lambda: lora_fx.swap(self.model, self.state, adapter="b"),
            "swap, of a directory": directory,
            AGAIN: lambda: lora_fx.swap(self.model, self.folder, adapter="b"),
            "rows": rows,
        }

    def row(self, what: str, step: Callable[[], object], repeats: int) -> tuple[str, ...]:
        """Return a line of the table."""
        step()
        self.forward()
        captures, compilations = self._captures(), self.compilations
        counted = ""
        if what != AGAIN:  # in a mode torch tells nobody what tensors are, so there the file is read whole
            with Operations() as operations:
                step()
            counted = str(operations.number)
        calls = calls_of(step)
        self.forward()
        found = self._captures() - captures, self.compilations - compilations
        spent = f"{1e3 * statistics.median(seconds(step) for _ in range(repeats)):.2f}" if repeats else ""
        return (what, str(self.sites), spent, counted, str(calls), *map(str, found))

    def _captures(self) -> int:
        return sum(region.captures for _, _, region in regions(self.model))


def seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50, help="0: count only")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.layers, options.width, Path(folder))
        time.sleep(3 * bool(options.repeats))  # what has just been written is read each time
        rows = [bench.row(what, step, options.repeats) for what, step in bench.steps().items()]
    table = [HEADS, *rows]
    told(options.write, "switch", table if options.repeats else [row[:2] + row[3:] for row in table])


if __name__ == "__main__":
    main()
