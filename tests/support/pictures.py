"""The figures of the documentation, drawn from what the code really does: `python -m tests.support.pictures` writes them.

A picture of a terminal is its text as SVG, with the colours that the command line uses; no font is embedded.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import lora_fx
from lora_fx.cli.output import painted
from tests.support.performance import DARK

FOLDER = Path(__file__).parents[2] / "docs" / "images"
RECORD = Path(__file__).parents[1] / "golden" / "run.jsonl"
_ESCAPE = re.compile(r"\x1b\[(\d+)m")
_COLOURS = {"31": "#b00020", "32": "#1b6e1b", "33": "#8a6100", "36": "#00606f"}
_WIDTH, _HEIGHT, _MARGIN = 7.25, 18, 16


def terminal(command: str, text: str) -> str:
    """Return the picture of a command and what it prints."""
    lines = [f"$ {command}", *painted(text).splitlines()]
    longest = max(len(_ESCAPE.sub("", line)) for line in lines)
    width, height = round(longest * _WIDTH + 2 * _MARGIN), len(lines) * _HEIGHT + 2 * _MARGIN
    rows = (
        f'<text x="{_MARGIN}" y="{_MARGIN + 13 + row * _HEIGHT}" xml:space="preserve">{"".join(_spans(line))}</text>'
        for row, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(command)}" font-family="ui-monospace, Menlo, Consolas, monospace" '
        f'font-size="12" fill="#1f2328">\n{DARK}\n<rect width="100%" height="100%" rx="8" fill="#f6f8fa"/>\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


def _spans(line: str) -> Iterator[str]:
    style = ""
    for index, part in enumerate(_ESCAPE.split(line)):
        if index % 2:
            style = f' fill="{_COLOURS[part]}"' if part in _COLOURS else ' font-weight="bold"' if part == "1" else ""
        elif part:
            yield f"<tspan{style}>{escape(part)}</tspan>"


def narrow(text: str) -> str:
    """Return a plan with each row on two lines, for a picture that fits on a phone."""
    lines = []
    for line in text.splitlines():
        path, *cells = re.split(r" {2,}(?!×)", line.strip())
        if line.startswith("  ") and len(cells) > 1:
            lines += [f"  {path}", f"      {'  '.join(cells)}"]
        else:
            lines += textwrap.wrap(line, 48) or [""]
    return "\n".join(lines)


def pictures() -> dict[str, str]:
    """Return every figure by its file name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, vocab_size=500
    )
    model = LlamaForCausalLM(config).eval()
    plan = lora_fx.plan(model, "attention")
    diff = lora_fx.diff(model, lora_fx.apply(model, plan))
    return {
        "plan.svg": terminal("lora-fx plan model.py:llama attention", str(plan)),
        "plan-narrow.svg": terminal("lora-fx plan model.py:llama attention", narrow(str(plan))),
        "block.svg": diff.to_svg() + "\n",
        "diff.svg": terminal("lora-fx diff model.py:llama attention", str(diff)),
        "training.svg": lora_fx.read_record(RECORD).to_svg() + "\n",
    }


def record_run() -> None:
    """Write the record that is drawn, of a training of a few seconds: `python -m tests.support.pictures record`.

    It is kept, since its last digits are not the same on every machine.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128, vocab_size=64
    )
    tuned = lora_fx.apply(LlamaForCausalLM(config), r=8, target="all-linear", backend="modules")
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=4e-3)
    RECORD.unlink(missing_ok=True)
    with lora_fx.Recorder(tuned, RECORD, every=5) as recorder:
        for _ in range(300):
            start, step = torch.randint(0, 61, (16, 1)), torch.randint(1, 4, (16, 1))
            ids = (start + step * torch.arange(24)) % 61  # count on: by one, by two or by three
            loss = tuned(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss)


def main() -> None:
    if sys.argv[1:] == ["record"]:
        record_run()
    FOLDER.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
