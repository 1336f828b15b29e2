"""Learning rates probed on data: each job ends as it would alone, whichever way they run; the best one is the recipe's."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.models.samples import Sample
from lora_fx.training import probing
from lora_fx.training.probing import probe_rates
from tests.support.twoadapters import Model, model

RATES = [1e-3, 1e-2, 1e-1]


def read(rules: dict[str, Any]) -> lora_fx.RuleSet:
    from lora_fx.rules.reader import read_rules

    return read_rules(rules)


ALL = {"rules": [{"match": {"name": "**.{q,k,out}"}, "lora": {"r": 2, "alpha": 8}}]}


def batches(number: int = 6) -> list[Sample]:
    return [Sample((torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(n)),)) for n in range(number)]


def to_one(output: Tensor, _batch: Sample) -> Tensor:
    return (output - 1).square().mean()


def alone(base: nn.Module, rules: lora_fx.RuleSet, rate: float, loss: Any) -> float:
    """Return the loss that one rate comes to, trained by hand."""
    torch.manual_seed(0)
    tuned = lora_fx.apply(base, rules, [batches()[0]]).eval()
    optimizer = torch.optim.AdamW(lora_fx.param_groups(tuned, lr=rate))
    for batch in batches()[:4]:
        loss(tuned(*batch.args), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(float(loss(tuned(*batch.args), batch)) for batch in batches()[4:]) / 2


@pytest.mark.parametrize("make", [model, lambda: fx.symbolic_trace(Model())], ids=["model", "graph"])
def test_jobs_in_one_batch_end_as_each_alone(make):
    torch.manual_seed(1)
    base = make()
    state, before = torch.get_rng_state(), copy.deepcopy(base.state_dict())
    probe = probe_rates(base, read(ALL), batches(), to_one, RATES)
    assert torch.equal(torch.get_rng_state(), state)
    assert (probe.how, probe.steps, probe.held_out) == ("all in one batch", 4, 2)
    for rate, loss in zip(RATES, probe.losses, strict=True):
        assert loss == pytest.approx(alone(base, read(ALL), rate, to_one), abs=1e-5)
    with torch.no_grad():
        expected = sum(float(to_one(base(*batch.args), batch)) for batch in batches()[4:]) / 2
    assert probe.before == pytest.approx(expected, abs=1e-6)
    assert probe.best == RATES[probe.losses.index(min(probe.losses))]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


class Output(NamedTuple):
    loss: Tensor


class OwnLoss(Model):
    def forward(self, x: Tensor) -> Output:
        return Output((super().forward(x) - 1).square().mean())


class Summed(Model):
    """Its output does not show the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) - 1).square().mean()


class Mixing(Model):
    """Each row takes part in all others."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 3 * y.mean(0, keepdim=True)


def with_head(rules: dict[str, Any]) -> dict[str, Any]:
    return {**rules, "rules": [{"match": {"name": "blocks.{0,1}.{q,k,out}"}, "lora": {"r": 2}}], "train": ["blocks.2"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rules", "loss", "why"),
    [
        (OwnLoss, ALL, None, "the loss is the output's own"),
        (Summed, ALL, lambda output, _: output, "does not show the rows of each job"),
        (Model, with_head(ALL), to_one, "modules of the model are trained too"),
        (Mixing, ALL, to_one, "row"),
    ],
    ids=["own loss", "no rows", "whole modules", "mixing"],
)
def test_elsewhere_they_run_one_after_the_other_and_end_as_each_alone(make, rules, loss, why):
    torch.manual_seed(1)
    base = make()
    probe = probe_rates(base, read(rules), batches(), loss, RATES)
    assert probe.how.startswith("one after the other")
    assert why in probe.how
    used = loss or (lambda output, _: output.loss)
    for rate, value in zip(RATES, probe.losses, strict=True):
        assert value == pytest.approx(alone(base, read(rules), rate, used), abs=1e-6)


@pytest.mark.parametrize("together", [True, False])
def test_a_job_that_diverges_is_stopped_and_harms_no_other(together):
    base, rules = model(), read(ALL)

    def loss(output: Tensor, batch: Sample) -> Tensor:
        return to_one(output, batch) if together else to_one(output, batch).reshape(1)[0]

    if not together:
        rules = read(with_head(ALL))
    with_one, without = (probe_rates(base, rules, batches(), loss, rates) for rates in ([1e-2, 1e12], [1e-2]))
    assert with_one.losses[0] == pytest.approx(without.losses[0], abs=1e-6)
    assert math.isnan(with_one.losses[1]) or with_one.losses[1] > 1e6
    assert with_one.best == 1e-2


def test_no_rate_that_trains_is_an_error():
    def broken(output: Tensor, _batch: Sample) -> Tensor:
        return output.sum() * float("nan")

    with pytest.raises(RefusedError, match="no rate trains on this data"):
        probe_rates(model(), read(ALL), batches(), broken, RATES)
    with pytest.raises(RefusedError, match="needs a loss that is a scalar"):
        probe_rates(model(), read(ALL), batches(), lambda output, _: output, RATES)
    two = {"rules": [{"match": {"name": f"**.{n}"}, "lora": {"r": 2, "adapter": n}} for n in ("q", "k")]}
    with pytest.raises(RefusedError, match="rules of one adapter"):
        probe_rates(model(), read(two), batches(), to_one, RATES)


def test_the_recipe_takes_the_rate_that_was_best():
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2)))
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        teacher[1][0].weight.add_(0.1 * torch.randn(64, 2) @ torch.randn(2, 64))
    data = [(torch.randn(16, 64),) for _ in range(8)]

    def loss(output: Tensor, batch: Sample) -> Tensor:
        return (output - teacher(*batch.args)).square().mean()

    made = lora_fx.recipe(base, "instruction", data=iter(data), loss=loss)
    assert made.probe is not None
    assert len(made.probe.rates) == 9
    assert made.lr == made.probe.best
    assert min(made.probe.losses) < made.probe.before
    assert "lowest loss of 9 rates" in str(made)
    assert made.rules.rules[0].lora == lora_fx.recipe(base, "instruction").rules.rules[0].lora
    chosen = lora_fx.recipe(base, "instruction", data=data, loss=loss, rates=[1e-2, 1e-3, 1e-2])
    assert chosen.probe.rates == (1e-3, 1e-2)
    with torch.device("meta"), pytest.raises(RefusedError, match="needs the model's weights"):
        lora_fx.recipe(nn.Sequential(nn.Linear(64, 64)), "instruction", data=data, loss=loss)


def test_a_batch_with_other_numbers_of_rows_runs_apart():
    class Masked(Model):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x) * scale

    torch.manual_seed(0)
    data = [Sample((batch.args[0], torch.ones(1, 1, 6))) for batch in batches(4)]
    probe = probe_rates(Masked(), read(ALL), data, to_one, RATES)
    assert "different numbers of rows" in probe.how
    assert probing.LEAST_BATCHES == 4


def test_rows_that_change_each_other_unseen_are_found_by_each_job_alone(monkeypatch):
    real = probing.rows

    def careless(tuned: nn.Module, names: list[str]) -> Any:
        return real(tuned, names[:1] * len(names))  # all rows have the first job's adapter

    monkeypatch.setattr(probing, "rows", careless)
    probe = probe_rates(model(), read(ALL), batches(), to_one, RATES)
    assert "rows of one job change those of another" in probe.how


@pytest.mark.parametrize(("dtype", "is_together"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_losses_of_half_precision_may_differ_by_its_rounding(dtype, is_together):
    signs = itertools.cycle([1, -1])

    def rounded(output: Tensor, batch: Sample) -> Tensor:
        return to_one(output, batch).float() * (1 + 0.002 * next(signs))

    given = [Sample((batch.args[0].to(dtype),)) for batch in batches()]
    probe = probe_rates(model().to(dtype), read(ALL), given, rounded, [1e-3])
    assert probe.how.startswith("all in one batch") == is_together
