"""A small model through everything once, to see whether adapting works with the torch that is installed."""

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.cli.health import HealthCheck

_RULES = {"version": 1, "rules": [{"name": "all", "match": {"name": "**.{up,down}"}, "lora": {"r": 2}}]}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + hidden


class _Patient:
    """The model and what becomes of it."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(_Block(), _Block())
            self.x = torch.randn(2, 3, 8)
        self.tuned: nn.Module = self.model

    def capture(self) -> str:
        self.tuned = lora_fx.apply(self.model, _RULES, (self.x,))
        regions = lora_fx.inspect(self.tuned).regions
        lost = [f"{region.path}: {'; '.join(region.failures)}" for region in regions if not region.graphs]
        _require(not lost and len(regions) == 2, ", ".join(lost) or f"{len(regions)} regions")
        _require(torch.equal(self.tuned(self.x), self.model(self.x)), "the adapted model differs from its base")
        return "2 of 2 blocks run as graphs, bit-equal to their base"

    def train(self) -> str:
        optimizer = torch.optim.SGD(lora_fx.parameters(self.tuned), lr=0.1)
        self.tuned(self.x).square().mean().backward()
        optimizer.step()
        _require(not torch.equal(self.tuned(self.x), self.model(self.x)), "a step changes nothing")
        return "a step changes the adapted model, and only it"

    def files(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            lora_fx.save(self.tuned, folder)
            again = lora_fx.load(self.model, folder)
        _require(torch.equal(again(self.x), self.tuned(self.x)), "the loaded adapter computes something else")
        return "saved and loaded, bit-equal"

    def merge(self) -> str:
        gap = (lora_fx.merge(self.tuned)(self.x) - self.tuned(self.x)).abs().max().item()
        _require(gap < 1e-5, f"max |Δ| {gap:.2g}")
        return f"max |Δ| {gap:.1g}"


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def tried() -> tuple[HealthCheck, ...]:
    """Return what came of capturing, training, saving and merging a tiny model."""
    patient = _Patient()
    acts = {"capture": patient.capture, "train": patient.train, "save, load": patient.files, "merge": patient.merge}
    return tuple(_check(name, act) for name, act in acts.items())


def _check(name: str, act: Callable[[], str]) -> HealthCheck:
    try:
        return HealthCheck(name, True, act())
    except Exception as error:  # whatever it is, it is what the user wants to know
        return HealthCheck(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
