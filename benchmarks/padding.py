"""What a step costs that leaves out padding: `python benchmarks/padding.py` prints the table of docs/performance.md.

BERT-base (8 × 128 tokens) and a Llama of 160 million parameters (4 × 256), of two layers and no head, rank 8 on all
linear layers of the blocks; 53, 69, 77 and 100 % of the tokens are real, in rows of several lengths, and the loss is
a mean of squares of theirs.  Ratios are to LB, the frozen base with the gradient of its input, which computes all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
import training
from beside import BATCH, asked, lines, models_asked
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.bench.peer import peft_subject
from lora_fx.bench.subjects import AGAIN, LB, PEFT, SPREAD, FrozenBase, Subject, copy_adapters
from tests.support.performance import told

HEADS = ("model", "real", "what", "time", "FLOPs", "saved", "peak")
BOTH, LIVE = "stack, recompute", "with liveness"
SHARES = (0.53, 0.69, 0.77, 1.0)


class OnRealTokens(nn.Module):
    """A model with a loss of its own, of real tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return {"loss": hidden[attention_mask.bool()].square().mean()}


def mask_of(batch: int, length: int, share: float) -> Tensor:
    """Return a mask with that share of ones, in rows of several lengths, the longest full where that is possible."""
    widest = min(share, 1 - share)
    lengths = [round(length * (share + widest * (2 * row / (batch - 1) - 1))) for row in range(batch)]
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def base_of(name: str, share: float, options: argparse.Namespace) -> FrozenBase:
    """Return a base with inputs of which that share is real."""
    model = training.MODELS[name].base(training.Sizes(2, options.width, False))
    batch, length = options.shape or BATCH[name]
    ids = torch.randint(1, 1000, (batch, length), generator=torch.Generator().manual_seed(1))
    return FrozenBase.of(OnRealTokens(model), {"input_ids": ids, "attention_mask": mask_of(batch, length, share)})


def subjects_of(base: FrozenBase) -> Iterator[Subject]:
    rules = {"version": 1, "rules": [{"match": training.BLOCKS, "lora": {"r": 8, "alpha": 16}}]}
    yield from (base.frozen(LB), base.frozen(AGAIN))
    plan = lora_fx.plan(base.model, rules, dict(base.sample.kwargs))
    ours = lora_fx.apply(base.model, plan)
    for _, adapter in all_attached(ours):
        nn.init.normal_(adapter.lora_B.weight, std=SPREAD)
    live = lora_fx.apply(base.model, plan, optimise=["stack", "recompute", "liveness"])
    copy_adapters(ours, live)
    yield base.subject(BOTH, ours)
    yield base.subject(LIVE, live)
    yield peft_subject(base, ours)


def rows(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table."""
    for name, share in ((name, share) for name in options.models for share in options.shares):
        print(f"{name}, {share:.0%} real", file=sys.stderr, flush=True)
        where = (training.MODELS[name].name, f"{share:.0%}")
        subjects = subjects_of(base_of(name, share, options))
        yield from lines(subjects, where, (BOTH, LIVE, PEFT), ("flops", "saved_bytes", "peak_bytes"), options)


def main(words: Sequence[str] | None = None) -> None:
    parser = asked(__doc__)
    models_asked(parser)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, metavar="SHARE", help="of real tokens")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    table = [HEADS, *rows(options)]
    told(options.write, "padding", table if options.rounds else [(*line[:3], *line[4:]) for line in table], 3)


if __name__ == "__main__":
    main()
