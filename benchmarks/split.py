"""What processes that share layers keep and send, and what that costs them: `python benchmarks/split.py` prints the
table of docs/beyond-one-machine.md.

A Llama of two layers and no head, with rank 8 on all linear layers, in one process and in two of gloo, which share the
layers of attention and MLP (ColwiseParallel, RowwiseParallel); with blocks as modules, as modules once more (the
difference is the noise of the times), and as graphs.  The three train in turns, so a step of one is compared with that
of another at nearly the same time; the median of those ratios is told, and their middle half.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from beside import asked
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import lora_fx
from lora_fx.text import scaled

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.performance import told
from tests.support.processes import in_processes
from tests.support.splitgraphs import STYLES, Sums, kept

HEADS = (
    "processes",
    "blocks as",
    "kept by each",
    "over modules",
    "sums of a step",
    "of",
    "Python calls",
    "time over modules",
)
WAYS = {"modules": "modules", "modules again": "modules", "graphs": "auto"}
RULES = {"version": 1, "rules": [{"match": {"name": "layers.*.**", "op": "linear"}, "lora": {"r": 8, "alpha": 16}}]}


def llama(width: int) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, "vocab_size": 1024}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, use_cache=False)
    return transformers.LlamaModel(config)


def made(width: int, backend: str, x: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    tuned: Any = lora_fx.apply(llama(width), RULES, x, backend=backend)
    if dist.get_world_size() > 1:
        parallelize_module(tuned, init_device_mesh("cpu", (dist.get_world_size(),)), STYLES)
    return tuned


def calls_of(work: Callable[[], object]) -> int:
    """Return how often Python functions are called."""
    number = 0

    def seen(_frame: object, event: str, _of: object) -> None:
        nonlocal number
        number += event == "call"

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return number


def measured(folder: Path) -> dict[str, tuple[int, int, int, int, list[float]]]:
    """Return (bytes kept, sums, their bytes, Python calls, seconds of steps) of each way here.

    The sizes lie in the folder.
    """
    width, tokens, rounds = torch.load(folder / "sizes")
    x = {"input_ids": torch.randint(0, 1024, (tokens // 128, 128), generator=torch.Generator().manual_seed(1))}
    models = {name: made(width, backend, x) for name, backend in WAYS.items()}

    def step(name: str) -> None:
        models[name](**x).last_hidden_state.square().mean().backward()

    found, times = {}, dict[str, list[float]]()
    for name in models:
        for _ in range(3):
            step(name)
        with Sums() as sent:
            step(name)
        calls = calls_of(lambda name=name: step(name))
        times[name] = []
        found[name] = (kept(models[name], x), sent.number, sent.bytes, calls, times[name])
    for turn in range(rounds):
        for name in (*models, *reversed(models))[3 * (turn % 2) :][:3]:
            dist.barrier()
            started = time.perf_counter()
            step(name)
            times[name].append(time.perf_counter() - started)
    return found


def ratio(mine: Sequence[float], other: Sequence[float]) -> str:
    """Return the median of how long steps take over others at nearly the same time, and their middle half."""
    least, middle, most = statistics.quantiles([a / b for a, b in zip(mine, other, strict=True)], n=4)
    return f"{middle:.3f} ({least:.3f} to {most:.3f})"


def main(words: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = asked(__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args(words)
    table: list[tuple[str, ...]] = [HEADS]
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.save((options.width, options.tokens, options.rounds), Path(folder) / "sizes")
            found = in_processes(number, measured, Path(folder), fresh=True)[0]
        whole, _, _, _, times = found["modules"]
        for name, (size, sums, sent, calls, mine) in found.items():
            compared = "" if name == "modules" else ratio(mine, times)
            sending = (str(sums), scaled(sent, "B") if sums else "")
            table.append(
                (str(number), name, scaled(size, "B"), f"{size / whole:.3f}", *sending, f"{calls:,}", compared)
            )
    told(options.write, "split", table)


if __name__ == "__main__":
    main()
