"""What a training step with adapters costs: `python benchmarks/training.py` prints the table of docs/performance.md.

Models of transformers from their configurations, with random weights and without dropout of their own; ratios are to
LB, the frozen base with the gradient of its input.  Without --full-depth they have --layers layers and no head: all
layers cost the same, so ratios do not depend on their number.  PEFT cannot adapt q and v of GPT-2's fused c_attn; there
`qv` is the whole of it, and q and v as slices by lora_fx alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import lora_fx
from lora_fx.bench.report import BenchReport
from lora_fx.bench.run import DTYPES, BenchOptions, bench
from lora_fx.bench.subjects import OURS, PEFT
from lora_fx.models.samples import Sample

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.performance import markdown, renewed, short_name, with_measurements

BLOCKS = {"name": "**.{h,layer,layers}.*.**", "op": "linear"}
QUERY_VALUE = {"name": "**.{q_proj,v_proj,query,value}"}
FUSED = {"name": "**.c_attn"}
SLICES = {"slices": {"of": ["q", "k", "v"], "adapt": ["q", "v"]}}
CONFIGS = ("qv", "all8", "all16")
VARIANTS = {"dora8": ("all r8, DoRA", {"dora": True}), "shared8": ("all r8, share_dropout", {"share_dropout": True})}
"""Others, by name: what the table calls them, and what their rules hold besides."""
HEADS = (
    "processor", "model", "adapted", "dropout", "dtype", "lora_fx / LB", "PEFT / LB", "excess removed",
    "saved / LB", "saved / PEFT", "FLOPs / LB", "aten calls / LB", "PEFT's", "A/A",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the models are."""

    layers: int
    width: int | None
    """None: each model's own."""
    whole: bool
    """All layers, and the head."""


@dataclass(frozen=True, slots=True)
class Model:
    """One of the table's models."""

    name: str
    config: Callable[[int, int], Any]
    """Returns the configuration for (layers, width)."""
    bare: type[nn.Module]
    whole: type[nn.Module]
    depth: int
    length: int
    """Tokens of one row of the batch."""
    fused: bool = False
    """Whether q, k and v are one weight."""
    own_width: int = 768
    """Of the model of that name."""

    def base(self, sizes: Sizes) -> nn.Module:
        """Return the model with random weights, the same each time."""
        torch.manual_seed(0)
        config = self.config(self.depth if sizes.whole else sizes.layers, sizes.width or self.own_width)
        if sizes.whole:
            return self.whole(config)
        return self.bare(config, add_pooling_layer=False) if self.bare in _POOLED else self.bare(config)

    def sample(self, model: Any, tokens: int) -> Sample:
        """Return about as many tokens, in rows of the model's length."""
        generator = torch.Generator().manual_seed(1)
        length = min(self.length, tokens)
        if self.name == "ViT-B/16":
            size = model.config.image_size
            return lora_fx.call(torch.randn(max(1, tokens // length), 3, size, size, generator=generator))
        ids = torch.randint(0, model.config.vocab_size, (max(1, tokens // length), length), generator=generator)
        return lora_fx.call(input_ids=ids)

    def configs(self, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """Yield (name in the table, rule without dropout, peer) for each configuration."""
        for name in wanted:
            if name in VARIANTS:
                told, more = VARIANTS[name]
                rule = _rule(BLOCKS, 8)
                yield told, {**rule, "lora": {**rule["lora"], **more}}, "peft"
            elif name != "qv":
                yield f"all r{name[3:]}", _rule(BLOCKS, int(name[3:])), "peft"
            elif self.fused:
                yield "c_attn r8", _rule(FUSED, 8), "peft"
                yield "q,v r8 (slices)", {**_rule(FUSED, 8), **SLICES}, None
            else:
                yield "q,v r8", _rule(QUERY_VALUE, 8), "peft"


def _rule(match: dict[str, str], rank: int) -> dict[str, Any]:
    return {"match": match, "lora": {"r": rank, "alpha": 2 * rank}}


def _gpt2(layers: int, width: int) -> Any:
    return transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False,
    )  # fmt: skip


def _bert(layers: int, width: int) -> Any:
    return transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def _vit(layers: int, width: int) -> Any:
    return transformers.ViTConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def _llama(layers: int, width: int) -> Any:
    return transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width,
        vocab_size=32000, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip


def _qwen(layers: int, width: int) -> Any:
    return transformers.Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, num_key_value_heads=2,
        intermediate_size=38 * width // 7, vocab_size=151936, max_position_embeddings=2048, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip


_POOLED = (transformers.BertModel, transformers.ViTModel)
MODELS = {
    "gpt2": Model("GPT-2 124M", _gpt2, transformers.GPT2Model, transformers.GPT2LMHeadModel, 12, 256, fused=True),
    "bert": Model("BERT-base", _bert, transformers.BertModel, transformers.BertForMaskedLM, 12, 128),
    "vit": Model("ViT-B/16", _vit, transformers.ViTModel, transformers.ViTForImageClassification, 12, 128),
    "llama": Model("Llama 160M", _llama, transformers.LlamaModel, transformers.LlamaForCausalLM, 12, 256),
    "qwen": Model("Qwen2-0.5B", _qwen, transformers.Qwen2Model, transformers.Qwen2ForCausalLM, 24, 128, own_width=896),
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table."""

    model: str
    adapted: str
    dropout: float
    dtype: str
    report: BenchReport

    def cells(self) -> tuple[str, ...]:
        ours, compared = self.report.relative(OURS), PEFT in self.report.counts
        counts, timing = self.report.counts, self.report.timing
        theirs = f"{counts[OURS].saved_bytes / counts[PEFT].saved_bytes:.3f}" if compared else ""
        if self.report.void:  # what no attempt could measure is not told
            timing = None
        times = [timing.ratios[name].text() if timing and name in timing.ratios else "" for name in (OURS, PEFT)]
        excess = self.report.excess_removed if timing else None
        removed = f"{100 * excess:.0f} %" if excess is not None else ""
        control = f"{timing.control.ratio:.3f}" if timing else "void" if self.report.void else ""
        calls = f"{self.report.relative(PEFT)[3]:.3f}" if compared else ""
        return (
            short_name(self.report.machine.processor), self.model, self.adapted, f"{self.dropout:g}", self.dtype,
            *times, removed, f"{ours[1]:.3f}", theirs,
            f"{ours[0]:.4f}", f"{ours[3]:.3f}", calls, control,
        )  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        labels = {"model": self.model, "adapted": self.adapted, "dropout": self.dropout, "dtype": self.dtype}
        return {**labels, **self.report.to_dict()}


def lines(options: argparse.Namespace) -> Iterator[Line]:
    """Yield the lines as they are measured."""
    sizes = Sizes(options.layers, options.width, options.full_depth)
    rounds = 0 if options.steps == "counters" else options.rounds
    for model in (MODELS[name] for name in options.models):
        base = model.base(sizes)
        sample = model.sample(base, options.tokens)
        for adapted, rule, peer in model.configs(options.configs):
            for dropout in options.dropout:
                rules = {"version": 1, "rules": [{**rule, "lora": {**rule["lora"], "dropout": dropout}}]}
                for dtype in options.dtype:
                    print(f"{model.name}, {adapted}, dropout {dropout:g}, {dtype}", file=sys.stderr, flush=True)
                    how = BenchOptions(peer, rounds, options.threads, DTYPES[dtype], False, options.attempts)
                    yield Line(model.name, adapted, dropout, dtype, bench(base, rules, sample, how))


def table(drawn: Sequence[Line]) -> str:
    """Return the lines as a table in Markdown."""
    return markdown([HEADS, *(line.cells() for line in drawn)])


def _where(report: BenchReport) -> str:
    machine, timing = report.machine, report.timing
    rounds = f", {timing.rounds} rounds" if timing is not None else ", counted only"
    threads = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
    return f"{machine.processor}, {threads}, torch {machine.torch}{rounds}."


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2", "bert", "vit", "llama"])
    asked.add_argument("--configs", nargs="+", choices=(*CONFIGS, *VARIANTS), default=list(CONFIGS))
    asked.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    asked.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    asked.add_argument("--rounds", type=int, default=10)
    asked.add_argument("--attempts", type=int, default=10, help="how often a void run is repeated")
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--steps", choices=("all", "counters"), default="all", help="counters: no times")
    asked.add_argument("--layers", type=int, default=2)
    asked.add_argument("--full-depth", action="store_true", help="all layers, and the head")
    asked.add_argument("--width", type=int, help="another one makes another model: to try the command")
    asked.add_argument("--tokens", type=int, default=512)
    asked.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    asked.add_argument("--write", type=Path, metavar="PAGE", help="renew the lines of this processor there")
    return asked.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    rows = list(lines(options))
    text = table(rows)
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(renewed(with_measurements(page, text)), encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps([line.to_dict() for line in rows], indent=1) + "\n", encoding="utf-8")
    print(text, _where(rows[0].report), sep="\n\n")


if __name__ == "__main__":
    main()
