"""Training runs that are recorded: a small model, its data, and files of records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.training.history import RecordedSite
from lora_fx.training.lines import BEGINNING, header_line
from tests.support import zoo

STEPS = 12
RULES = zoo.rules("*.{up,down}", r=2, alpha=4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def base() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(Layer() for _ in range(3)))


def adapted(model: nn.Module | None = None, rules: Any = RULES) -> nn.Module:
    """Return a twin whose factors are always the same; its B is 0."""
    twin = lora_fx.apply(base() if model is None else model, rules, backend="modules")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in twin.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    return twin


def batches(number: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)) for _ in range(number)]


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(lora_fx.parameters(model), lr=0.05)


def train(model: nn.Module, recorder: Any, data: Iterable[Sequence[Tensor]]) -> list[float]:
    """Train in a plain loop, and return the losses."""
    optimizer, losses = optimizer_of(model), []
    for batch in data:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.step(loss)
        losses.append(loss.item())
    return losses


def plain(path: Path, every: int = 5) -> lora_fx.TrainingRecord:
    tuned = adapted()
    with lora_fx.Recorder(tuned, path, every=every) as recorder:
        train(tuned, recorder, batches())
    return lora_fx.read_record(path)


def assert_alike(record: lora_fx.TrainingRecord, other: lora_fx.TrainingRecord) -> None:
    assert record.sites == other.sites
    assert [line.step for line in record.steps] == [line.step for line in other.steps]
    for a, b in zip(record.steps, other.steps, strict=True):
        assert (a.loss, a.mean_of) == (pytest.approx(b.loss, rel=1e-5), b.mean_of)
        assert list(a.norms) == pytest.approx(list(b.norms), rel=1e-4)


def sites(layers: int = 4) -> list[RecordedSite]:
    return [
        RecordedSite(f"layers.{k}.{name}_proj", "attention", 8, 2.0, f"layers.{k}")
        for k in range(layers)
        for name in "qv"
    ]


def line(step: int, loss: object, norms: Sequence[object], mean_of: int = 10) -> bytes:
    return json.dumps({"step": step, "loss": loss, "mean_of": mean_of, "norms": norms}).encode() + b"\n"


def written(path: Path, lines: Iterable[bytes], layers: int = 4) -> Path:
    """Write a record of a run that never was."""
    path.write_bytes(header_line("Llama", "0.1.0", sites(layers)) + b"".join(lines))
    assert path.read_bytes().startswith(BEGINNING)
    return path


def made_up(path: Path, number: int = 40, layers: int = 4) -> Path:
    """Write the record of a run whose loss falls, whose later layers move more, and whose first q is not trained."""
    lines = [
        line(
            10 * k,
            round(2 * 0.93**k + 0.05 * (k * 7 % 5), 4),
            [0.0 if site == 0 else round((1 + site // 2) * (1 - 0.95**k) / 4, 4) for site in range(2 * layers)],
        )
        for k in range(1, number + 1)
    ]
    return written(path, lines, layers)
