"""Every hazard is right in a graph, or right without one and says why; none is silently wrong."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from torch import nn

from lora_fx.errors import RefusedError
from tests.support import shared
from tests.support.hazards import HAZARDS
from tests.support.hazards.expected import OUTCOMES, REFUSED, SHARED_OUTCOMES
from tests.support.judging import INFERENCE, INSIDE, TRAINING, Step, Trial, Verdict, judge, run_in_graphs

SHARED = shared.load("hazards")
SHARED_HAZARDS: Sequence[type[nn.Module]] = () if SHARED is None else SHARED.HAZARDS
by_name = functools.partial(pytest.mark.parametrize, ids=lambda kind: kind.__name__)


class Stack(nn.Module):
    """A model with the hazard as its block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, *args, **kwargs):
        for block in self.blocks:
            result = block(*args, **kwargs)
        return result


def trial_of(kind: type[nn.Module], as_block: bool) -> Trial:
    """Judge the hazard in three modes on a, b, a, b; each call with other seeds."""
    probe = kind()

    def turn(model: nn.Module, to_b: bool) -> None:
        if kind in HAZARDS:
            (model.blocks[0] if as_block else model).turn(to_b)

    steps = [
        Step(name, getattr(probe, name), mode, functools.partial(turn, to_b=name == "b"), seed)
        for mode in (INFERENCE, TRAINING, INSIDE)
        for seed, name in enumerate("abab")
    ]
    if "random" in getattr(kind, "checks", ()):
        steps += [Step("a", probe.a, INFERENCE, seed=seed) for seed in range(8)]
    return Trial(
        make=lambda: Stack(kind()) if as_block else kind(),
        samples=lambda: [probe.a()],
        steps=steps,
        regions=("blocks.0",) if as_block else ("",),
        reset=probe.reset if kind in HAZARDS else lambda: None,
        outside=probe.outside if kind in HAZARDS else lambda: None,
        after=functools.partial(turn, to_b=False),
    )


@functools.cache
def verdict_on(kind: type[nn.Module], as_block: bool) -> Verdict:
    return judge(trial_of(kind, as_block))


def check(kind: type[nn.Module], expected: str, as_block: bool = False) -> None:
    if kind.__name__ in REFUSED:
        with pytest.raises(RefusedError, match=REFUSED[kind.__name__]):
            verdict_on(kind, as_block)
        return
    verdict = verdict_on(kind, as_block)
    assert verdict.silent is None, verdict.silent
    assert expected in verdict.outcome
    if expected != "graph":
        assert verdict.hits < verdict.calls, "it runs in a graph now: the table is behind"


@by_name("kind", HAZARDS)
def test_hazard_is_right_in_a_graph_or_says_why_it_runs_without(kind):
    check(kind, OUTCOMES.get(kind.__name__, "graph"))


@pytest.mark.slow
@by_name("kind", HAZARDS)
@pytest.mark.sampled(2)
def test_hazard_as_a_block_is_right_in_a_graph_or_says_why_it_runs_without(kind):
    check(kind, OUTCOMES.get(kind.__name__, "graph"), as_block=True)


def turned(kind: type[nn.Module], made: list[nn.Module]) -> Trial:
    """Return the trial of a hazard that is in its other state before it is planned for; note what is made for it."""
    trial, probe = trial_of(kind, False), kind()

    def make() -> nn.Module:
        probe.turn(to_b=False)  # a module is made in a world that has not changed yet
        module = kind()
        made.append(module)
        module.turn(to_b=True)
        return module

    def reset() -> None:
        probe.reset()
        probe.turn(to_b=True)

    made.append(probe)
    return replace(trial, make=make, samples=lambda: [probe.a(), probe.b()], reset=reset)


@pytest.mark.slow
@by_name("kind", [kind for kind in HAZARDS if kind.__name__ not in REFUSED])
@pytest.mark.sampled(2)
def test_hazard_in_its_other_state_is_right_though_graphs_of_the_first_are_known(kind):
    run_in_graphs(trial_of(kind, False))  # what comes of it is judged by a test of its own
    made: list[nn.Module] = [kind()]
    try:
        with suppress(RefusedError):  # by name: hooks that cannot be copied
            assert judge(turned(kind, made)).silent is None
    finally:
        for module in made:
            module.turn(to_b=False)
        kind().reset()


@pytest.mark.skipif(not SHARED_HAZARDS, reason="the shared zoo is not beside this checkout")
def test_shared_hazards_are_right_in_a_graph_or_say_why_they_run_without():
    for kind in SHARED_HAZARDS:
        check(kind, SHARED_OUTCOMES.get(kind.__name__, "graph"))


def share_in_graphs(kinds: Sequence[type[nn.Module]]) -> float:
    """Return the share whose own forward, not only a linear in it, runs in a graph at every repeated call."""
    return sum(verdict_on(kind, False).outcome == "graph" for kind in kinds) / len(kinds)


@pytest.mark.skipif(not SHARED_HAZARDS, reason="the shared zoo is not beside this checkout")
def test_three_quarters_of_the_shared_hazards_run_in_graphs():
    assert share_in_graphs(SHARED_HAZARDS) >= 0.75


def test_table_names_only_hazards_that_exist():
    assert set(OUTCOMES) <= {kind.__name__ for kind in HAZARDS}
    assert not SHARED_HAZARDS or set(SHARED_OUTCOMES) <= {kind.__name__ for kind in SHARED_HAZARDS}
