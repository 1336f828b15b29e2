"""Measure a model by rules: first that all compute the same, then what can be counted, then time."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.api import Rules
from lora_fx.bench.counters import Counts, counted, frozen_heap
from lora_fx.bench.facts import device_of, machine_of, setting_of
from lora_fx.bench.peer import check_parity, peft_subject, require_peft
from lora_fx.bench.report import BenchReport
from lora_fx.bench.subjects import AGAIN, LB, MODULES, OURS, PEFT, FrozenBase, Subject, copy_adapters
from lora_fx.bench.timing import fit, summarised, timed
from lora_fx.progress.steps import ShowProgress, running, step
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet
from lora_fx.tuned import report

SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CAPTURES = 2
"""Steps after which an adapted model has captured what it will capture."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to measure."""

    peer: str | None = None
    """`peft`, to compare with it."""
    rounds: int = 20
    """Of timing; 0 counts only."""
    threads: int = 1
    dtype: torch.dtype | None = None
    """Of the base; None leaves it as it is."""
    others: bool = True
    """Whether the module backend and full fine-tuning are measured too."""
    attempts: int = 1
    """How often a void run is measured at most."""


def bench(
    model: nn.Module,
    rules: Rules,
    example_inputs: object = None,
    options: BenchOptions | None = None,
    progress: ShowProgress = None,
) -> BenchReport:
    """Return what a training step of the model with adapters by the rules costs; the model stays unchanged.

    Args:
        model: with values; it is measured in train mode.
        rules: as for `lora_fx.plan`.
        example_inputs: as for `lora_fx.plan`; of several the first is measured.  None: those of the model's class.
        options: how to measure.
        progress: as for `lora_fx.plan`; nothing is shown but between steps, so that nothing runs beside them.

    Raises:
        LoraFxError: PEFT is asked for and not installed.
        RefusedError: no inputs, nothing to adapt, or sites that PEFT cannot adapt; names every one.
        InvariantError: lora_fx and PEFT compute different things.
    """
    wanted = options or BenchOptions()
    if wanted.peer is not None:
        require_peft()
    read = read_rules(rules)
    with running("bench", progress, 6 + wanted.rounds, clock=False), _settled(wanted.threads), frozen_heap():
        base = FrozenBase.of(model, example_inputs, wanted.dtype)
        with step("adapting", None):
            ours = base.adapted(OURS, read)
            subjects = list(_subjects(base, ours, read, wanted))
            parity = next((check_parity(ours, peer) for peer in subjects if peer.name == PEFT), None)
            before = _warm(ours)
        counts = _counted(subjects)
        timing = None
        if wanted.rounds:
            steps = {subject.name: subject.step for subject in subjects}
            device = device_of(base.model).type
            timing = fit(lambda: summarised(timed(steps, wanted.rounds, device=device), LB, AGAIN), wanted.attempts)
    counts.pop(AGAIN)
    setting = setting_of(base, ours, read.source, before)
    return BenchReport(setting, machine_of(base.model, wanted.threads), counts, timing, parity)


def _warm(ours: Subject) -> report.Report:
    """Return what the adapted model is made of when its graphs are captured."""
    for _ in range(CAPTURES):
        ours.step()
    return report.report(ours.model)


def _subjects(base: FrozenBase, ours: Subject, rules: RuleSet, options: BenchOptions) -> Iterator[Subject]:
    yield from (base.frozen(LB), base.frozen(AGAIN), ours)
    if options.others:
        modules = base.adapted(MODULES, rules, backend="modules")
        copy_adapters(ours.model, modules.model)
        yield modules
    if options.peer is not None:
        yield peft_subject(base, ours.model)
    if options.others:
        yield base.full()


def _counted(subjects: Sequence[Subject]) -> dict[str, Counts]:
    """Return what a step of each costs, by name."""
    counts = {}
    with step("counting", len(subjects), "subjects", share=5) as doing:
        for subject in subjects:
            subject.step()  # what a first step makes for all others is not a step's own
            counts[subject.name] = counted(subject.step, subject.forward, subject.own())
            doing.advance(subject.name)
    return counts


@contextlib.contextmanager
def _settled(threads: int) -> Iterator[None]:
    """Fix the number of threads and the random state, and give both back."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
