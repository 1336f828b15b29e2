"""What leaving out rows gains, model by model: `python benchmarks/leftout.py` prints the table of docs/performance.md.

The models are tiny ones of 34 architectures, which lie beside a checkout (shared/zoo).  FLOPs of a step are those with
"liveness" and "loss" over those without, on four sequences of 12, 9, 6 and 4 tokens where a model takes a mask, with
three labelled tokens in ten where it returns something for each, else with one class for each input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.support import shared
from tests.support.gains import Gain, gain_of
from tests.support.performance import told

HEADS = ("model", "FLOPs", "padding", "labels", "head", "why no more")
_MOST = 2
"""How many reasons a line of the table has."""


def line(name: str, gain: Gain) -> tuple[str, ...]:
    done = ("yes" if what else "" for what in (gain.padding, gain.labels, gain.head))
    whole = gain.padding and gain.labels
    return (name, f"{gain.ratio:.2f}", *done, "" if whole else "; ".join(gain.reasons[:_MOST]))


def rows(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    models = shared.load("models")
    assert models is not None, "the models are not there"
    for name, build in models.zoo().items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        model, inputs = build()
        gain = gain_of(models.zero_dropout(model), inputs, models.main_tensors)
        print(name, gain, file=sys.stderr, flush=True)
        yield line(name, gain)


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--models", nargs="+", default=(), help="only these")
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = asked.parse_args(words)
    told(options.write, "leftout", [HEADS, *rows(options.models)])


if __name__ == "__main__":
    main()
