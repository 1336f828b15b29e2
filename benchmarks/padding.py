"""What a step costs whose padding is not computed: `python benchmarks/padding.py`; times are of this machine.

BERT-base and a Llama of 160 million parameters, 2 layers and 1,000 words each, on 8 sentences of up to 128 tokens,
right-padded, of which 53, 69, 77 and 100 % are real and labelled; rank 8 on all linear layers of the blocks.  Ratios
are to LB, the frozen base with the gradient of its input, on the same batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import training
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.bench.counters import Counts, counted
from lora_fx.bench.peer import peft_subject
from lora_fx.bench.subjects import AGAIN, LB, PEFT, SPREAD, FrozenBase, Subject, copy_adapters
from lora_fx.bench.timing import fit, summarised, timed
from tests.support.performance import told

HEADS = ("model", "real tokens", "what", "time", "peak", "saved", "FLOPs")
BOTH, LIVE = "stack, recompute", "with liveness"
ROWS, LENGTH, WORDS = 8, 128, 1000


def bert(width: int) -> nn.Module:
    config = BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(1, width // 64), num_hidden_layers=2,
        vocab_size=WORDS, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return BertForMaskedLM(config)


def llama(width: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(1, width // 64), num_hidden_layers=2,
        vocab_size=WORDS, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {"BERT-base": bert, "Llama 160M": llama}


def lengths(share: float) -> Tensor:
    """Return how many tokens each sentence has, evenly spread, so that the share of all is real."""
    least = 2 * share - 1 if share > 0.5 else 1 / LENGTH
    return (torch.linspace(least, 1, ROWS) * LENGTH).round().clamp(2, LENGTH).long()


def sample(share: float) -> dict[str, Any]:
    ids = torch.randint(0, WORDS, (ROWS, LENGTH))
    real = torch.arange(LENGTH) < lengths(share).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, -100)}


def subjects_of(base: FrozenBase) -> Iterator[Subject]:
    rules = {"version": 1, "rules": [{"match": training.BLOCKS, "lora": {"r": 8, "alpha": 16}}]}
    yield from (base.frozen(LB), base.frozen(AGAIN))
    plan = lora_fx.plan(base.model, rules, base.sample)
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
    for name in options.models:
        for share in options.shares:
            torch.manual_seed(0)
            base = FrozenBase.of(MODELS[name](options.width), sample(share))
            subjects = {subject.name: subject for subject in subjects_of(base)}
            for subject in subjects.values():
                subject.step()
                subject.step()
            times = _times(subjects, options)
            counts = {what: counted(s.step, s.forward, s.own()) for what, s in subjects.items() if what != AGAIN}
            real = sum(lengths(share).tolist()) / (ROWS * LENGTH)
            for what in (BOTH, LIVE, PEFT):
                yield (name, f"{real:.0%}", what, times.get(what, ""), *_over(counts[what], counts[LB]))
            print(name, f"{real:.0%}", times, file=sys.stderr, flush=True)


def _times(subjects: dict[str, Subject], options: argparse.Namespace) -> dict[str, str]:
    """Return the ratios to LB; none of a void run."""
    if not options.rounds:
        return {}
    steps = {name: subject.step for name, subject in subjects.items()}
    timing = fit(lambda: summarised(timed(steps, options.rounds), LB, AGAIN), options.attempts)
    return {} if timing.void else {name: ratio.text() for name, ratio in timing.ratios.items()}


def _over(mine: Counts, held: Counts) -> Iterator[str]:
    for counter in ("peak_bytes", "saved_bytes", "flops"):
        yield f"{getattr(mine, counter) / getattr(held, counter):.3f}"


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=16, help="of timing; 0 counts only")
    asked.add_argument("--attempts", type=int, default=3, help="how often a void run is repeated")
    asked.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    asked.add_argument("--shares", type=float, nargs="+", default=[0.53, 0.69, 0.77, 1.0])
    asked.add_argument("--width", type=int, default=768)
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = asked.parse_args(words)
    torch.set_num_threads(1)
    lines = [HEADS, *rows(options)]
    told(options.write, "padding", lines if options.rounds else [(*line[:3], *line[4:]) for line in lines])


if __name__ == "__main__":
    main()
