"""What fewer kept bytes cost: `python benchmarks/kept.py` prints the table of docs/performance.md.  Nothing is timed.

BERT-base, ViT-B/16 and a Llama of 160 million parameters, of two layers and no head, on 512 tokens, with rank 8 on all
linear layers of the blocks, by what `optimise` names.  Ratios are to LB, the frozen base with the gradient of its
input.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import training
from beside import asked, lines
from torch import nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.bench.run import DTYPES
from lora_fx.bench.subjects import AGAIN, LB, SPREAD, FrozenBase, Subject, copy_adapters
from tests.support.performance import told

HEADS = ("model", "dtype", "optimise", "FLOPs", "saved", "peak")
USUAL = ("stack", "recompute")
NAMED = tuple((*USUAL, *more) for more in ((), ("attention",), ("halve",), ("attention", "halve")))
RULES = {"version": 1, "rules": [{"match": training.BLOCKS, "lora": {"r": 8, "alpha": 16}}]}


def name_of(optimise: Sequence[str]) -> str:
    return ", ".join(optimise)


def subjects_of(base: FrozenBase, wanted: Sequence[Sequence[str]]) -> Iterator[Subject]:
    yield from (base.frozen(LB), base.frozen(AGAIN))
    first: Any = None
    for optimise in wanted:
        tuned = lora_fx.apply(base.model, RULES, base.sample, optimise=optimise)
        if first is None:
            first = tuned
            for _, adapter in all_attached(tuned):
                nn.init.normal_(adapter.lora_B.weight, std=SPREAD)
        copy_adapters(first, tuned)
        yield base.subject(name_of(optimise), tuned)


def main(words: Sequence[str] | None = None) -> None:
    parser = asked(__doc__)
    parser.add_argument("--models", nargs="+", choices=training.MODELS, default=["bert", "vit", "llama"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--width", type=int, help="another one: to try the command")
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args(words)
    options.rounds = 0
    torch.set_num_threads(options.threads)
    table = [HEADS]
    for name, dtype in ((name, dtype) for name in options.models for dtype in options.dtype):
        print(f"{name}, {dtype}", file=sys.stderr, flush=True)
        model = training.MODELS[name]
        plain = model.base(training.Sizes(2, options.width, False))
        base = FrozenBase.of(plain, model.sample(plain, options.tokens), DTYPES[dtype])
        wanted = NAMED if dtype == "float32" else NAMED[:2]  # what is in bfloat16 is not halved
        figures = ("flops", "saved_bytes", "peak_bytes")
        rows = lines(subjects_of(base, wanted), (model.name, dtype), [*map(name_of, wanted)], figures, options)
        table += [(*row[:3], *row[4:]) for row in rows]
    told(options.write, "kept", table, 3)


if __name__ == "__main__":
    main()
