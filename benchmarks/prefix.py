"""What blocks below the first adapter cost: `python benchmarks/prefix.py` prints the table of docs/performance.md.

BERT-base (8 × 128 tokens) and a Llama of 160 million parameters (4 × 256), of four layers and no head; rank 8 on all
linear layers of the upper two; the loss is a mean of squares.  Each way of training is counted in its second epoch, on
the same rows in another order.  Ratios are to the step without `cached_prefix`; with checkpointing, to the step as
transformers sets it up, which asks for gradients of the embeddings.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence

import torch
import training
from beside import BATCH, asked, compared, models_asked, over, sizes
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.bench.counters import Counts, counted
from lora_fx.bench.subjects import SPREAD
from lora_fx.text import scaled
from tests.support.performance import told

HEADS = ("model", "what", "time", "FLOPs", "saved", "peak", "rows not computed", "kept")
PLAIN, AGAIN, SECOND = "every epoch", "every epoch again", "with cached_prefix, second epoch"
CHECKPOINTED, CUT = "checkpointed, every epoch", "checkpointed, disable_input_require_grads()"
CUT_SECOND = "the same with cached_prefix, second epoch"
LAYERS = 4
FIGURES = ("flops", "saved_bytes", "peak_bytes")


class Steps:
    """One adapted model, and a step of it on rows in an order."""

    def __init__(self, name: str, options: argparse.Namespace, checkpointed: bool = False, cut: bool = False) -> None:
        batch, length = options.shape or BATCH[name]
        self.ids = torch.randint(1, 1000, (batch, length), generator=torch.Generator().manual_seed(1))
        model = training.MODELS[name].base(training.Sizes(LAYERS, options.width, False))
        model.config.use_cache = False
        upper = {"name": f"**.{{layer,layers}}.{{{LAYERS // 2}..{LAYERS - 1}}}.**", "op": "linear"}
        rules = {"version": 1, "rules": [{"match": upper, "lora": {"r": 8, "alpha": 16}}]}
        self.model: nn.Module = lora_fx.apply(model, rules, {"input_ids": self.ids}).train()
        torch.manual_seed(0)
        for _, adapter in all_attached(self.model):
            nn.init.normal_(adapter.lora_B.weight, std=SPREAD)
        if checkpointed:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if cut:
            self.model.disable_input_require_grads()
        self.order = torch.arange(batch)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.ids[self.order])[0].square().mean()

    def step(self) -> None:
        self.forward().backward()

    def counts(self) -> Counts:
        for _ in range(2):
            self.step()
        self.order = self.order.flip(0)
        return counted(self.step, self.forward, [*self.model.parameters(), *self.model.buffers()])


def measured(name: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield the lines of one model."""
    where = training.MODELS[name].name
    plain, checkpointed = Steps(name, options), Steps(name, options, checkpointed=True)
    cut = Steps(name, options, checkpointed=True, cut=True)
    held, base = plain.counts(), checkpointed.counts()
    yield _line(where, PLAIN, held, None)
    with cached(name, options) as (steps, cache):
        found = steps.counts()
        ratio = timing_of(plain, steps, options)
        yield _line(where, SECOND, found, held, cache, ratio)
    yield _line(where, CHECKPOINTED, base, None)
    yield _line(where, CUT, cut.counts(), base, None, timing_of(checkpointed, cut, options))
    with cached(name, options, checkpointed=True, cut=True) as (steps, cache):
        found = steps.counts()
        yield _line(where, CUT_SECOND, found, base, cache, timing_of(checkpointed, steps, options))


@contextlib.contextmanager
def cached(name: str, options: argparse.Namespace, **ways: bool) -> Iterator[tuple[Steps, lora_fx.PrefixCache]]:
    steps = Steps(name, options, **ways)
    with lora_fx.cached_prefix(steps.model) as cache:
        yield steps, cache


def timing_of(base: Steps, steps: Steps, options: argparse.Namespace) -> str:
    if not options.rounds:
        return ""
    subjects = {PLAIN: base.step, AGAIN: base.step, SECOND: steps.step}
    timing = compared(subjects, PLAIN, AGAIN, options)
    return "" if timing.void else timing.ratios[SECOND].text()


def _line(
    model: str,
    what: str,
    counts: Counts,
    base: Counts | None,
    cache: lora_fx.PrefixCache | None = None,
    time: str = "",
) -> tuple[str, ...]:
    kept = ("", "")
    if cache is not None:
        report = cache.report
        assert not report.otherwise, report.otherwise
        kept = (f"{report.hits} of {report.hits + report.misses}", scaled(report.bytes, "B"))
    if base is None:
        return (model, what, "", *sizes(counts, FIGURES), *kept)
    return (model, what, time, *over(counts, base, FIGURES), *kept)


def main(words: Sequence[str] | None = None) -> None:
    parser = asked(__doc__)
    models_asked(parser)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    lines = [HEADS, *(line for name in options.models for line in measured(name, options))]
    told(options.write, "prefix", lines if options.rounds else [(*line[:2], *line[3:]) for line in lines], 2)


if __name__ == "__main__":
    main()
