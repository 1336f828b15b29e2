"""For the tests of the command line: a small model, a run of a command, and texts that are kept."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from torch import nn

from lora_fx.cli import main

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "cli"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.gate = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.v_proj(x) * self.gate + torch.relu(self.q_proj(x) - self.k_proj(x))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def small() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Small(), (torch.zeros(2, 5, dtype=torch.long),)


SMALL = "tests.support.clitools:small"


def run(*words: object, columns: int | None = None, stdin: str | None = None, **environment: str) -> Result:
    size = {} if columns is None else {"COLUMNS": str(columns)}
    return CliRunner(env={"COLUMNS": None, **size, **environment}).invoke(main, list(map(str, words)), input=stdin)


def golden(name: str, text: str) -> None:
    """Compare with tests/golden/cli; `GOLDEN=write python -m pytest …` writes the file."""
    path = GOLDEN / name
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"GOLDEN=write brings {path.name} up to date"
