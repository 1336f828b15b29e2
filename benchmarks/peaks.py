"""The most memory that a training step needs: `python benchmarks/peaks.py` prints it for whole models.

Each has all its layers and its head, and is called with 512 tokens; rank 8 on all linear layers.  Peak bytes are those
of what a step makes and holds at once (activations, temporaries, gradients), without weights, adapters and optimiser;
they are counted, not timed, and the same each time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import training

from lora_fx.bench.run import DTYPES, BenchOptions, bench
from lora_fx.bench.subjects import FULL, LB, OURS, PEFT
from lora_fx.text import scaled
from tests.support.performance import told

HEADS = ("model", "dtype", "dropout", "frozen base", "lora_fx", "PEFT", "full")


def rows(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return the lines of the table: bytes of the frozen base, and ratios to them."""
    lines = []
    for model in (training.MODELS[name] for name in options.models):
        base = model.base(training.Sizes(options.layers or model.depth, options.width, options.layers is None))
        sample = model.sample(base, options.tokens)
        ((_, rule, _),) = model.configs(["all8"])
        for dtype in options.dtype:
            for dropout in options.dropout:
                print(f"{model.name}, {dtype}, dropout {dropout:g}", file=sys.stderr, flush=True)
                rules = {"version": 1, "rules": [{**rule, "lora": {**rule["lora"], "dropout": dropout}}]}
                report = bench(base, rules, sample, BenchOptions("peft", 0, 1, DTYPES[dtype]))
                ratios = [f"{report.relative(name)[2]:.3f}" for name in (OURS, PEFT, FULL)]
                held = scaled(report.counts[LB].peak_bytes, "B")
                lines.append((model.name, dtype, f"{dropout:g}", held, *ratios))
    return lines


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--models", nargs="+", choices=training.MODELS, default=["bert", "llama"])
    asked.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    asked.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    asked.add_argument("--tokens", type=int, default=512)
    asked.add_argument("--layers", type=int, help="only so many, and no head: to try the command")
    asked.add_argument("--width", type=int, help="another one: to try the command")
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = asked.parse_args(words)
    told(options.write, "peaks", [HEADS, *rows(options)])


if __name__ == "__main__":
    main()
