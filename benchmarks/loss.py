"""What a step costs whose logits are never whole: `python benchmarks/loss.py` prints the table of docs/performance.md.

A Llama of two layers, as wide as Qwen2-0.5B, 512 tokens, rank 8 on all linear layers of the blocks, with a vocabulary
of 151,936 and every token labelled, and with one of 32,000 and 30, 50 and 100 % of them.  Ratios are to LB, the frozen
base with the gradient of its input, whose logits are whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
import training
from beside import asked, lines
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.bench.peer import peft_subject
from lora_fx.bench.subjects import AGAIN, LB, PEFT, SPREAD, FrozenBase, Subject, copy_adapters
from tests.support.performance import told

SETTINGS = ("151936:1", "32000:0.3", "32000:0.5", "32000:1")
HEADS = ("vocabulary", "labelled", "what", "time", "peak", "saved", "FLOPs")
TOKENS_SEEN = 24
"""By `plan`: its runs of the head take long, and graphs are for any number of tokens."""
BOTH, LATE, ROWS = "stack, recompute", "with loss", "loss, liveness"


def base_of(vocabulary: int, labelled: float, options: argparse.Namespace) -> FrozenBase:
    """Return a base of that vocabulary, with inputs of which that share is labelled."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width, intermediate_size=options.width * 38 // 7, num_hidden_layers=2,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=vocabulary, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, vocabulary, (1, options.tokens))
    labels = ids.clone()
    labels[0, : round(options.tokens * (1 - labelled))] = -100
    return FrozenBase.of(LlamaForCausalLM(config), {"input_ids": ids, "labels": labels})


def subjects_of(base: FrozenBase) -> Iterator[Subject]:
    rules = {"version": 1, "rules": [{"match": training.BLOCKS, "lora": {"r": 8, "alpha": 16}}]}
    yield from (base.frozen(LB), base.frozen(AGAIN))
    few = {name: tensor[:, -TOKENS_SEEN:] for name, tensor in base.sample.kwargs.items()}
    plan = lora_fx.plan(base.model, rules, few)
    ours = lora_fx.apply(base.model, plan)
    for _, adapter in all_attached(ours):
        nn.init.normal_(adapter.lora_B.weight, std=SPREAD)
    late = lora_fx.apply(base.model, plan, optimise=["stack", "recompute", "loss"])
    rows = lora_fx.apply(base.model, plan, optimise=["stack", "recompute", "loss", "liveness"])
    copy_adapters(ours, late)
    copy_adapters(ours, rows)
    yield base.subject(BOTH, ours)
    yield base.subject(LATE, late)
    yield base.subject(ROWS, rows)
    yield peft_subject(base, ours)


def rows(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table."""
    for setting in options.settings:
        words, share = setting.split(":")
        vocabulary, labelled = int(words), float(share)
        print(f"{vocabulary}, {labelled:.0%} labelled", file=sys.stderr, flush=True)
        where = (f"{vocabulary:,}", f"{labelled:.0%}")
        subjects = subjects_of(base_of(vocabulary, labelled, options))
        yield from lines(subjects, where, (BOTH, LATE, ROWS, PEFT), ("peak_bytes", "saved_bytes", "flops"), options)


def main(words: Sequence[str] | None = None) -> None:
    parser = asked(__doc__, threads=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="VOCABULARY:SHARE", help="what is labelled")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    table = [HEADS, *rows(options)]
    told(options.write, "loss", table if options.rounds else [(*line[:3], *line[4:]) for line in table], 3)


if __name__ == "__main__":
    main()
