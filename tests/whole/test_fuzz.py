"""Random modules: no call of an adapted one is ever silently wrong, and most run in a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from torch import nn

from lora_fx.regions.install import regions
from tests.support.fuzzing import RandomModule, random_modules
from tests.support.judging import Verdict, judge

FEW, SOME, MANY = 12, 240, 2400
"""Examples in every run of the tests, in the slow ones, and in those of `make fuzz`."""
PORTION = 120


@dataclass
class Tally:
    """What became of the calls of all examples."""

    examples: int = 0
    calls: int = 0
    hits: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Of the calls that had been made once before, the share that ran in graphs of the whole module."""
        return self.hits / self.calls

    def add(self, verdict: Verdict) -> None:
        self.examples += 1
        self.calls += verdict.calls
        self.hits += verdict.hits
        if verdict.hits < verdict.calls:
            self.reasons.update(verdict.reasons[:1])
        event("graph" if verdict.hits == verdict.calls else "fallback")

    def __str__(self) -> str:
        share = f"{self.hits} of {self.calls} repeated calls of {self.examples} modules ran in graphs"
        return "\n".join((share, *(f"  {number} × {reason}" for reason, number in self.reasons.most_common(12))))


def fuzz(examples: int, seed: int, phases: Sequence[Phase] = tuple(Phase), **more: object) -> Tally:
    """Judge that many random modules, the same ones for the same seed; return what became of them."""
    tally = Tally()
    passed: set[str] = set()

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    @given(random_modules())
    def never_silently_wrong(module: RandomModule) -> None:
        assume(module.source not in passed)  # hypothesis likes to repeat itself: here each example is another program
        assume(module.runs())
        verdict = judge(module.trial(**more))
        assert verdict.silent is None, verdict.silent
        passed.add(module.source)
        tally.add(verdict)

    never_silently_wrong()
    return tally


def means_something(tally: Tally) -> None:
    """A fuzz whose calls all fall back to Python would prove nothing."""
    print(tally)
    assert tally.share >= 0.75, tally


def test_random_modules_are_never_silently_wrong_and_mostly_run_in_graphs():
    tally = fuzz(FEW, seed=0)
    assert tally.examples >= 0.9 * FEW
    means_something(tally)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 1 + SOME // PORTION))
def test_hundreds_of_random_modules_are_never_silently_wrong(seed: int):
    means_something(fuzz(PORTION, seed))


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(101, 101 + MANY // PORTION))
def test_thousands_of_random_modules_are_never_silently_wrong(seed: int):
    means_something(fuzz(PORTION, seed))


def test_wrong_graph_of_a_random_module_is_found():
    def nudge(model: nn.Module) -> None:
        for _, _, region in regions(model):
            for program in region.block.programs:
                right = program.function
                program.function = lambda *args, right=right: _nudged(right(*args))

    with pytest.raises(AssertionError, match="off by"):
        fuzz(20, seed=0, phases=[Phase.generate], sabotage=nudge)


def _nudged(result: object) -> object:
    """Return the result with its first tensor off by one bit."""
    if isinstance(result, torch.Tensor):
        return torch.nextafter(result, torch.tensor(torch.inf)) if result.is_floating_point() else result
    if isinstance(result, dict):
        return {key: _nudged(value) for key, value in result.items()}
    return type(result)(map(_nudged, result)) if isinstance(result, (tuple, list)) else result


def test_random_modules_are_varied():
    sources: list[str] = []

    @settings(max_examples=300, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(random_modules())
    def collect(module: RandomModule) -> None:
        sources.append(module.source)

    collect()
    text = "\n".join(sources)
    wanted = (
        "if t > 4", "mask is None", "if flag", "self.training", "self.ema.", "add_(", "no_grad", "F.dropout",
        "torch.rand_like", ".detach()", "bfloat16", "for layer in self.layers", "x.is_contiguous()", "self.config",
        "torch.cat", ".chunk(", "einsum", "return {", "return (", "extra", "pair",
    )  # fmt: skip
    assert [part for part in wanted if part not in text] == []
    assert len(set(sources)) > 100
