"""What an adapter for each row of a batch costs: `python benchmarks/rows.py` prints it; times are of this machine.

A decoder of four layers of width 768 with adapters of rank 8 on all its linears.  Forward: 64 rows without gradients,
over the base on the same batch, beside PEFT's mixed batch (`adapter_names`).  Jobs: eight adapters that are trained at
once, each on its own rows with a loss of its own, over eight steps of PEFT, one for each adapter; and the frozen base's
step on all rows over eight steps of it.  Time is the median of paired ratios, beside that of the base over itself, as
`lora_fx.bench` measures; FLOPs are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.bench import counters
from lora_fx.bench.timing import Timing, fit, summarised, timed
from tests.support.performance import told

RANK, WIDTH, LAYERS, WORDS = 8, 768, 4, 1000
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RULES = {"version": 1, "rules": [{"match": {"name": f"**.{{{','.join(LINEARS)}}}"}, "lora": {"r": RANK}}]}
ROWS, JOBS = 64, 8
HEADS = ("what", "rows", "adapters", "tokens a row", "lora_fx", "PEFT", "FLOPs", "of PEFT", "A/A")


def base() -> nn.Module:
    """Return the frozen decoder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=LAYERS, num_attention_heads=12,
        num_key_value_heads=12, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def batch(rows: int, tokens: int) -> Tensor:
    return torch.randint(0, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(1))


def tuned(adapters: int, ids: Tensor) -> nn.Module:
    """Return the decoder with so many adapters, none of them zero."""
    model = lora_fx.apply(base(), RULES, {"input_ids": ids[:2]})
    lora_fx.rename(model, "default", "a0")
    for number in range(1, adapters):
        lora_fx.add(model, RULES, adapter=f"a{number}")
    return filled(model, [p for name, p in model.named_parameters() if "lora_" in name])


def peft(adapters: int) -> nn.Module:
    """Return PEFT's model with so many adapters."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS))
    model = get_peft_model(base(), config, adapter_name="a0")
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", config)
    return filled(model, [p for name, p in model.named_parameters() if "lora_" in name])


def filled(model: nn.Module, factors: Sequence[nn.Parameter]) -> nn.Module:
    for parameter in factors:
        nn.init.normal_(parameter, std=0.02)
    return model


def forwards(adapters: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Return the forwards of one batch: of the base, ours and PEFT's."""
    ids, plain = batch(ROWS, tokens), base()
    ours, theirs = tuned(adapters, ids), peft(adapters).eval()
    names = [f"a{row * adapters // ROWS}" for row in range(ROWS)]

    def of_base() -> None:
        with torch.no_grad():
            plain(ids)

    def of_ours() -> None:
        with torch.no_grad(), lora_fx.rows(ours, names):
            ours(ids)

    def of_theirs() -> None:
        with torch.no_grad():
            theirs(ids, adapter_names=names)

    return {"base": of_base, "base again": of_base, "lora_fx": of_ours, "PEFT": of_theirs}


def jobs(tokens: int) -> dict[str, Callable[[], object]]:
    """Return steps of eight adapters: PEFT's one after the other, and ours at once, a row for each."""
    ids = batch(JOBS, tokens)
    ours, theirs = tuned(JOBS, ids).train(), peft(JOBS).train()
    names = [f"a{number}" for number in range(JOBS)]

    def of_theirs() -> None:
        for number, name in enumerate(names):
            theirs.set_adapter(name)
            row = ids[number : number + 1]
            loss(theirs(row).logits, row).backward()
        theirs.zero_grad()

    def of_ours() -> None:
        with lora_fx.rows(ours, names):
            loss(ours(ids).logits, ids).backward()
        ours.zero_grad()

    return {"PEFT": of_theirs, "PEFT again": of_theirs, "lora_fx": of_ours}


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses of the rows."""
    each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return each.mean(1).sum()


def without_adapters(tokens: int) -> dict[str, Callable[[], object]]:
    """Return the same steps of the frozen base, with the gradient of its inputs: what is to be won at most."""
    ids, plain = batch(JOBS, tokens), base().train()

    def step(rows: Tensor) -> None:
        inputs = plain.get_input_embeddings()(rows).requires_grad_()  # type: ignore[operator]
        loss(plain(inputs_embeds=inputs).logits, rows).backward()

    def of_each() -> None:
        for row in ids.split(1):
            step(row)

    return {"eight": of_each, "eight again": of_each, "lora_fx": lambda: step(ids)}


def measured(steps: dict[str, Callable[[], object]], rounds: int, attempts: int) -> Timing:
    reference, control = list(steps)[:2]
    return fit(lambda: summarised(timed(steps, rounds), reference, control), attempts)


def row_of(
    what: str, steps: dict[str, Callable[[], object]], sizes: tuple[int, int, int], rounds: int, attempts: int
) -> tuple[str, ...]:
    """Return a line of the table."""
    reference = next(iter(steps))
    for step in steps.values():
        step()
    flops = {name: counters.flops(step) for name, step in steps.items()}
    timing = measured(steps, rounds, attempts) if rounds else None
    spent = [_ratio(timing, name) for name in ("lora_fx", "PEFT")]
    counted = [f"{flops[name] / flops[reference]:.2f}" if name in flops else "" for name in ("lora_fx", "PEFT")]
    control = "" if timing is None else f"{timing.control.ratio:.3f}"
    return (what, *map(str, sizes), *spent, *counted, control)


def _ratio(timing: Timing | None, name: str) -> str:
    if timing is None:
        return ""
    return "" if timing.void or name not in timing.ratios else timing.ratios[name].text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="0: count only")
    parser.add_argument("--attempts", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--jobs", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        *(("forward, over the base", forwards, ROWS, count, tokens) for tokens in options.tokens for count in (8, 64)),
        *(("step, over PEFT's eight", lambda _, tokens: jobs(tokens), JOBS, JOBS, tokens) for tokens in options.jobs),
        *(
            ("the base's, over its eight", lambda _, tokens: without_adapters(tokens), JOBS, 0, tokens)
            for tokens in options.jobs
        ),
    ]
    rows = []
    for what, steps, batch_size, count, tokens in cases:
        rows.append(row_of(what, steps(count, tokens), (batch_size, count, tokens), options.rounds, options.attempts))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    told(options.write, "rows", [HEADS, *rows], keys=4)


if __name__ == "__main__":
    main()
