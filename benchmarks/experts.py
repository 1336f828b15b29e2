"""What adapters on routed experts cost: `python benchmarks/experts.py` prints it; times are of this machine.

A block of experts with its router, and a whole decoder layer, of Mixtral's and of Qwen3-MoE's shape, rank 8 on both
banks.  The base is the same model frozen, with gradients to its input, so that the backward pass goes through it too.
Time is the median of paired ratios, beside that of the base over itself, as `lora_fx.bench` measures; saved bytes count
every storage that autograd keeps for the backward pass once, weights and adapters apart; FLOPs are those of both
passes; the peak is of bytes that were made since the step began, and live at once.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeSparseMoeBlock

import lora_fx
from lora_fx.bench import counters
from lora_fx.bench.peer import peft_model
from lora_fx.bench.timing import Timing, fit, summarised, timed
from tests.support.performance import told

RANK = 8
ATTEMPTS = 10
"""How often a void run is repeated."""
RULES = {"version": 1, "rules": [{"match": {"name": "**.experts.{gate_up,down}_proj"}, "lora": {"r": RANK}}]}
HEADS = ("model", "experts run by", "lora_fx", "PEFT", "kept", "by PEFT", "peak", "of PEFT", "FLOPs", "A/A")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's experts."""

    name: str
    experts: int
    top: int
    intermediate: int
    hidden: int = 512


MIXTRAL, QWEN3 = Shape("Mixtral", 8, 2, 1792), Shape("Qwen3-MoE", 32, 4, 256)


class Block(nn.Module):
    """The router and the experts."""

    def __init__(self, config: MixtralConfig | Qwen3MoeConfig) -> None:
        super().__init__()
        mixtral = isinstance(config, MixtralConfig)
        self.mlp = MixtralSparseMoeBlock(config) if mixtral else Qwen3MoeSparseMoeBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x)
        return result


class Layer(nn.Module):
    """A whole decoder layer."""

    def __init__(self, config: MixtralConfig | Qwen3MoeConfig) -> None:
        super().__init__()
        mixtral = isinstance(config, MixtralConfig)
        self.layer = MixtralDecoderLayer(config, 0) if mixtral else Qwen3MoeDecoderLayer(config, 0)
        self.width = config.head_dim

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * torch.logspace(0, -4, self.width // 2).repeat(2)
        result = self.layer(
            x, position_embeddings=tuple(part[None].to(x.dtype) for part in (angles.cos(), angles.sin()))
        )
        return result if isinstance(result, Tensor) else result[0]


@dataclass(frozen=True)
class Case:
    """One model on one number of tokens."""

    kind: type[nn.Module]
    implementation: str
    shape: Shape = MIXTRAL
    tokens: int = 512
    dtype: torch.dtype = torch.float32

    def base(self) -> nn.Module:
        """Return the frozen model, with random weights."""
        torch.manual_seed(0)
        shape, heads = self.shape, 8
        sizes = {
            "hidden_size": shape.hidden, "num_experts_per_tok": shape.top, "num_attention_heads": heads,
            "num_key_value_heads": heads, "head_dim": shape.hidden // heads, "num_hidden_layers": 1,
            "attn_implementation": "sdpa", "experts_implementation": self.implementation,
        }  # fmt: skip
        if shape.name == MIXTRAL.name:
            config = MixtralConfig(intermediate_size=shape.intermediate, num_local_experts=shape.experts, **sizes)
        else:
            config = Qwen3MoeConfig(moe_intermediate_size=shape.intermediate, num_experts=shape.experts, **sizes)
        config._attn_implementation, config._experts_implementation = "sdpa", self.implementation
        model = self.kind(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
        return model.to(self.dtype).requires_grad_(False)

    def input(self) -> Tensor:
        return torch.randn(1, self.tokens, self.shape.hidden, generator=torch.Generator().manual_seed(1)).to(self.dtype)

    def name(self) -> str:
        return f"{self.shape.name}, {self.kind.__name__.lower()}"


def adapted(base: nn.Module, sample: Tensor) -> nn.Module:
    """Return the base with adapters that are no longer zero."""
    tuned = lora_fx.apply(base, RULES, (sample[:, :16],))
    for parameter in lora_fx.parameters(tuned):
        nn.init.normal_(parameter, std=0.02)
    return tuned


def step(model: nn.Module, x: Tensor) -> None:
    """Run both passes, down to the gradient of the input."""
    model.zero_grad()
    model(x.detach().requires_grad_()).sum().backward()


def flops(model: nn.Module, x: Tensor) -> int:
    """Return the FLOPs of both passes."""
    return counters.flops(lambda: step(model, x))


def saved_bytes(model: nn.Module, x: Tensor, weights: bool = False) -> int:
    """Return the bytes that autograd keeps between the passes, those of the model's own parameters only on request."""
    own = () if weights else (*model.parameters(), *model.buffers())
    return counters.saved_bytes(lambda: model(x.detach().requires_grad_()), own)


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the most bytes that were live at once of what both passes make."""
    return counters.tallied(lambda: step(model, x)).peak


def times(models: dict[str, nn.Module], x: Tensor, rounds: int) -> Timing:
    """Return the paired ratios to the first model, by wall clock and by the time of the processor."""
    steps = {name: functools.partial(step, model, x) for name, model in models.items()}
    return fit(lambda: summarised(timed(steps, rounds), "base", "again"), ATTEMPTS)


def line(case: Case, rounds: int) -> tuple[str, ...]:
    """Return a line of the table: times, bytes and FLOPs over the base's."""
    x, base = case.input(), case.base()
    tuned = adapted(base, x)
    models = {"base": base, "again": case.base(), "lora_fx": tuned, "PEFT": peft_model(base, tuned)}
    timing = times(models, x, rounds) if rounds else None
    spent = [f"{timing.ratios[name].ratio:.2f}" if timing and not timing.void else "" for name in ("lora_fx", "PEFT")]
    bytes_ = [
        f"{measure(models[name], x) / measure(base, x):.2f}"
        for measure in (saved_bytes, peak_bytes)
        for name in ("lora_fx", "PEFT")
    ]
    control = ("void" if timing.void else f"{timing.control.ratio:.3f}") if timing else ""
    return (case.name(), case.implementation, *spent, *bytes_, f"{flops(tuned, x) / flops(base, x):.2f}", control)


def cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    for shape in (MIXTRAL, QWEN3):
        for kind in (Block, Layer):
            for implementation in ("eager", "grouped_mm"):
                yield Case(kind, implementation, shape, tokens, dtype)


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=10, help="0: no times")
    asked.add_argument("--tokens", type=int, default=512)
    asked.add_argument("--dtype", type=functools.partial(getattr, torch), default=torch.float32)
    asked.add_argument(
        "--only", default="", help="words of the cases to measure: `Mixtral block eager`; the page keeps the others"
    )
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = asked.parse_args(words)
    torch.set_num_threads(1)
    rows = [HEADS]
    for case in cases(options.tokens, options.dtype):
        if all(word.lower() in f"{case.name()} {case.implementation}".lower() for word in options.only.split()):
            rows.append(line(case, options.rounds))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    told(options.write, "experts", rows, keys=2)


if __name__ == "__main__":
    main()
