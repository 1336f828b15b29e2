"""Several adapters trained at once, each on rows of its own: each ends as if it had been trained alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from lora_fx.regions.install import regions
from tests.support.twoadapters import model


class Job(NamedTuple):
    name: str
    sites: str
    r: int
    alpha: float
    rate: float
    rows: int

    @property
    def rules(self) -> dict[str, Any]:
        return {"version": 1, "rules": [{"match": {"name": self.sites}, "lora": {"r": self.r, "alpha": self.alpha}}]}


JOBS = [
    Job("small", "**.q", 1, 2, 1e-2, 2),
    Job("wide", "**.{q,k,out}", 4, 4, 3e-3, 3),
    Job("other", "**.out", 2, 16, 1e-3, 1),
]


def data(job: Job, step: int) -> Tensor:
    return torch.randn(job.rows, 5, 6, generator=torch.Generator().manual_seed(100 * JOBS.index(job) + step))


def loss(result: Tensor) -> Tensor:
    return (result - 1).square().mean()


def factors(tuned: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {key: p for key, p in tuned.named_parameters() if f".{name}." in key}


def started(tuned: nn.Module, jobs: list[Job]) -> nn.Module:
    """Give the adapters of jobs the values that each has at its start."""
    with torch.no_grad():
        for job in jobs:
            generator = torch.Generator().manual_seed(JOBS.index(job))
            for key, parameter in factors(tuned, job.name).items():
                is_a = ".lora_A." in key
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 if is_a else parameter * 0)
    return tuned


def alone(job: Job, steps: range) -> dict[str, Tensor]:
    tuned = lora_fx.apply(model(), job.rules, (data(job, 0),))
    lora_fx.rename(tuned, "default", job.name)
    started(tuned, [job])
    optimizer = torch.optim.AdamW(factors(tuned, job.name).values(), lr=job.rate)
    for step in steps:
        loss(tuned(data(job, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: p.detach() for key, p in factors(tuned, job.name).items()}


def together() -> nn.Module:
    first, *others = JOBS
    tuned = lora_fx.apply(model(), first.rules, (data(first, 0),))
    lora_fx.rename(tuned, "default", first.name)
    for job in others:
        lora_fx.add(tuned, job.rules, adapter=job.name)
    return started(tuned, JOBS)


def optimizer_of(tuned: nn.Module, job: Job) -> torch.optim.Optimizer:
    return torch.optim.AdamW(factors(tuned, job.name).values(), lr=job.rate)


def train(tuned: nn.Module, jobs: dict[str, tuple[Job, torch.optim.Optimizer]], step: int) -> None:
    names = [job.name for job, _ in jobs.values() for _ in range(job.rows)]
    with lora_fx.rows(tuned, names):
        parts = tuned(torch.cat([data(job, step) for job, _ in jobs.values()])).split(
            [j.rows for j, _ in jobs.values()]
        )
        torch.stack([loss(part) for part in parts]).sum().backward()
    for _, optimizer in jobs.values():
        optimizer.step()
        optimizer.zero_grad()


def assert_as_alone(tuned: nn.Module, job: Job, steps: range) -> None:
    for key, expected in alone(job, steps).items():
        assert_close(tuned.state_dict()[key], expected, atol=1e-6, rtol=1e-5)


def test_each_job_ends_as_if_it_had_been_trained_alone():
    tuned = together()
    jobs = {job.name: (job, optimizer_of(tuned, job)) for job in JOBS}
    for step in range(20):
        train(tuned, jobs, step)
    for job in JOBS:
        assert_as_alone(tuned, job, range(20))


def test_a_job_is_stopped_and_another_added_and_nothing_is_captured_again():
    tuned = together()
    lora_fx.drop(tuned, "other")
    small, wide, other = JOBS
    jobs = {job.name: (job, optimizer_of(tuned, job)) for job in (small, wide)}
    for step in range(5):
        train(tuned, jobs, step)
    del jobs["small"]
    lora_fx.add(tuned, other.rules, adapter="other")
    started(tuned, [other])
    jobs["other"] = (other, optimizer_of(tuned, other))
    for step in range(5, 10):
        train(tuned, jobs, step)
    assert_as_alone(tuned, small, range(5))
    assert_as_alone(tuned, wide, range(10))
    assert_as_alone(tuned, other, range(5, 10))
    assert sum(region.captures for _, _, region in regions(tuned)) == 0


def test_a_difference_of_a_thousandth_is_found():
    tuned = together()
    faster = [optimizer_of(tuned, job._replace(rate=job.rate * 1.001)) for job in JOBS]
    jobs = {job.name: (job, optimizer) for job, optimizer in zip(JOBS, faster, strict=True)}
    for step in range(3):
        train(tuned, jobs, step)
    with pytest.raises(AssertionError, match="not close"):
        assert_as_alone(tuned, JOBS[0], range(3))
