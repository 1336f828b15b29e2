"""What codes of four bits keep of an adapter: `python benchmarks/codes.py` prints the table of docs/export.md.

The encoder and the reviews are those of `make demo`.  Its linears are put on a grid, an adapter of rank 8 on all of
them is trained for some steps, and merged onto the same grid: by the nearest codes, and by codes that inputs choose.
All counts are of the weights of which the nearest codes keep a tenth or less.  Nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lora_fx
from demo.sentiment import fresh_model, read_reviews
from lora_fx.models.grids import q4_0_grid
from tests.support.performance import told

HEADS = ("grid", "weights", "of which nearest keeps ≤ 0.1", "kept ≥ 0.7", "≥ 0.5", "median", "least", "most")
LINEARS = "**.layer.**.{query,key,value,dense}"
RULES = {"version": 1, "rules": [{"match": {"name": LINEARS}, "lora": {"r": 8, "alpha": 16}}]}
GRIDS = {"int4": "base", "q4_0": "q4_0"}


def on_grid(name: str) -> nn.Module:
    """Return the encoder with its linears in four bits, 32 numbers to a scale."""
    model = fresh_model()
    linears = [module for module in model.bert.encoder.modules() if isinstance(module, nn.Linear)]
    if name == "int4":
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        quantize_(model.bert.encoder, IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32)))
        return model
    for layer in linears:  # as it is read from a file in Q4_0
        grid = q4_0_grid(layer.weight.detach())
        assert grid is not None
        layer.weight.data = grid.values(grid.nearest(layer.weight.detach()))
    return model


def row(name: str, steps: int, batches: int) -> tuple[str, ...]:
    """Train, merge onto the grid, and count."""
    reviews, _ = read_reviews(16 * (steps + batches), 0)
    given = reviews.batches(16)
    tuned = lora_fx.apply(on_grid(name), RULES, given[0][0]).train()
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-3)
    for inputs, labels in given[:steps]:
        F.cross_entropy(tuned(**inputs).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_fx.LoraFxWarning)  # which names the weights that keep little
        _, sites = lora_fx.merged_on_grid(tuned.eval(), [inputs for inputs, _ in given[steps:]], grid=GRIDS[name])
    kept = [site.kept for site in sites if site.nearest <= 0.1]
    counts = (str(sum(value >= least for value in kept)) for least in (0.7, 0.5))
    figures = (f"{figure:.2f}" for figure in (statistics.median(kept), min(kept), max(kept)))
    return (name, str(len(sites)), str(len(kept)), *counts, *figures)


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    asked.add_argument("--steps", type=int, default=40)
    asked.add_argument(
        "--batches", type=int, default=32, help="of 16 reviews, by which codes are chosen and kept is told"
    )
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = asked.parse_args(words)
    torch.manual_seed(0)
    told(options.write, "codes", [HEADS, *(row(name, options.steps, options.batches) for name in options.grids)])


if __name__ == "__main__":
    main()
