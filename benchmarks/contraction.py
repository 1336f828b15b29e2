"""Where W + s · B A pays: `python benchmarks/contraction.py`; times are of this machine, one thread, float32.

One linear of the size d × d with its adapter, the gradients of input and factors included: median of the paired ratios
of the merged step to the factored one, as `lora_fx.bench` measures, beside the ratio of their FLOPs and what is chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from lora_fx.adapters.fused.contraction import least_rows
from lora_fx.adapters.fused.forward import adapted
from lora_fx.adapters.fused.terms import Facts, Term
from lora_fx.bench.analytic import Linear
from lora_fx.bench.timing import Timing, summarised, timed

FACTORED, AGAIN, MERGED = "factored", "factored again", "merged"
FLOPS = 1e11
"""FLOPs of a second, about: how many rounds fit into the time that is asked for."""


def step(tokens: int, width: int, rank: int, merged: bool) -> Callable[[], None]:
    """Return both passes of a layer."""
    torch.manual_seed(0)
    weight = torch.randn(width, width) / width**0.5
    first, second = torch.randn(rank, width).requires_grad_(), torch.randn(width, rank).requires_grad_()
    x, slope = torch.randn(tokens, width).requires_grad_(), torch.randn(tokens, width)
    term = Term(Facts(1e-3, merged=merged), weight, None, first, second)

    def both() -> None:
        for tensor in (x, first, second):
            tensor.grad = None
        adapted((term,), x)[0].backward(slope)

    return both


def measured(tokens: int, width: int, rank: int, seconds: float) -> Timing:
    """Return the ratios to the factored step."""
    kinds = {FACTORED: False, AGAIN: False, MERGED: True}
    steps = {name: step(tokens, width, rank, merged) for name, merged in kinds.items()}
    guess = 4 * tokens * width**2 / FLOPS
    return summarised(timed(steps, max(6, min(60, round(seconds / guess / 3)))), FACTORED, AGAIN)


def counted(tokens: int, width: int, rank: int) -> str:
    """Return the ratio of the FLOPs, and which order is chosen by it."""
    layer, least = Linear(tokens, width, width, rank), least_rows(width, width, rank)
    chosen = FACTORED if least is None or tokens < least else MERGED
    return f"{layer.merged(rebuilt=True).total / layer.factored().total:.3f} | {chosen}"


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--widths", type=int, nargs="+", default=[768, 2048])
    asked.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    asked.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 128])
    asked.add_argument("--seconds", type=float, default=6, help="of each measurement, about")
    options = asked.parse_args(words)
    torch.set_num_threads(1)
    print("d | tokens | r | merged / factored | by FLOPs | chosen | A/A")
    for width in options.widths:
        for tokens in options.tokens:
            for rank in options.ranks:
                timing = measured(tokens, width, rank, options.seconds)
                control = f"{timing.control.ratio:.3f}{' VOID' if timing.void else ''}"
                row = (str(width), f"{tokens:,}", str(rank), timing.ratios[MERGED].text())
                print(" | ".join((*row, counted(tokens, width, rank), control)), flush=True)


if __name__ == "__main__":
    main()
