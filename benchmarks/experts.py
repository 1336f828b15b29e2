"""What adapters on routed experts cost: `python benchmarks/experts.py` prints it; times are of this machine.

A Mixtral block of experts with its router, and a whole decoder layer: 8 experts, top-2, hidden size 512, rank 8 on both
banks.  The base is the same model frozen, with gradients to its input, so that the backward pass goes through it too.
Time is the median of paired ratios, beside that of the base over itself, as `lora_fx.bench` measures; saved bytes count
every storage that autograd keeps for the backward pass once, weights and adapters apart; FLOPs are those of both
passes; the peak is of bytes that were made since the step began, and live at once.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralSparseMoeBlock

import lora_fx
from lora_fx.bench import counters
from lora_fx.bench.timing import Timing, fit, summarised, timed

EXPERTS, TOP, RANK = 8, 2, 8
ATTEMPTS = 10
"""How often a void run is repeated."""
RULES = {"version": 1, "rules": [{"match": {"name": "**.experts.{gate_up,down}_proj"}, "lora": {"r": RANK}}]}


class Block(nn.Module):
    """The router and the experts."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.mlp = MixtralSparseMoeBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x)
        return result


class Layer(nn.Module):
    """A whole decoder layer."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.layer = MixtralDecoderLayer(config, 0)
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
    intermediate: int
    tokens: int
    dtype: torch.dtype = torch.float32
    hidden: int = 512

    def base(self) -> nn.Module:
        """Return the frozen model, with random weights."""
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_local_experts=EXPERTS,
            num_experts_per_tok=TOP, num_attention_heads=8, num_key_value_heads=8, head_dim=self.hidden // 8,
            num_hidden_layers=1, attn_implementation="sdpa", experts_implementation=self.implementation,
        )  # fmt: skip
        config._attn_implementation, config._experts_implementation = "sdpa", self.implementation
        model = self.kind(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
        return model.to(self.dtype).requires_grad_(False)

    def input(self) -> Tensor:
        return torch.randn(1, self.tokens, self.hidden, generator=torch.Generator().manual_seed(1)).to(self.dtype)

    def text(self) -> str:
        what = f"{self.kind.__name__.lower():5} {self.implementation:10} {self.intermediate:5} {self.tokens:6}"
        return f"{what}  {str(self.dtype).removeprefix('torch.'):8}"


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


def times(base: nn.Module, again: nn.Module, tuned: nn.Module, x: Tensor, rounds: int) -> Timing:
    """Return the paired ratios to the base, by wall clock and by the time of the processor."""
    models = {"base": base, "again": again, "adapted": tuned}
    steps = {name: functools.partial(step, model, x) for name, model in models.items()}
    return fit(lambda: summarised(timed(steps, rounds), "base", "again"), ATTEMPTS)


def cases() -> Iterator[Case]:
    for kind in (Block, Layer):
        for intermediate in (1792, 1024):
            for tokens in (512, 2048):
                for implementation in ("eager", "grouped_mm"):
                    yield Case(kind, implementation, intermediate, tokens)
        yield Case(kind, "batched_mm", 1792, 16)
    yield Case(Layer, "grouped_mm", 1792, 512, torch.bfloat16)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=20, help="0: no times")
    asked.add_argument("--only", default="", help="words of the cases to measure: `Block eager`")
    options = asked.parse_args()
    torch.set_num_threads(1)
    print("model experts     inner  tokens  dtype      FLOPs   saved  +weights  peak    time  (cpu)   base/base (cpu)")
    for case in cases():
        if not all(word.lower() in case.text() for word in options.only.split()):
            continue
        x, base = case.input(), case.base()
        tuned = adapted(base, x)
        ratios = [measure(tuned, x) / measure(base, x) for measure in (flops, saved_bytes)]
        ratios += [saved_bytes(tuned, x, True) / saved_bytes(base, x, True), peak_bytes(tuned, x) / peak_bytes(base, x)]
        line = case.text() + "  ".join(f"{ratio:7.3f}" for ratio in ratios)
        if options.rounds:
            timing = times(base, case.base(), tuned, x, options.rounds)
            adapted_and_control = (timing.ratios["adapted"], timing.control)
            line += "".join(f"  {ratio.ratio:.3f} ({ratio.processor:.3f})" for ratio in adapted_and_control)
        print(line, flush=True)


if __name__ == "__main__":
    main()
