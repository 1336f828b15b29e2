"""The judge: an adapted module beside its untouched base, call by call, everything that a call leaves behind."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.models.torch_internals import pytree
from lora_fx.regions.install import regions
from tests.support.portraits import difference, portrait, portrait_of_state
from tests.support.zoo import randomise_, rules

Call = tuple[tuple[Any, ...], dict[str, Any]]
GRADIENT_TOLERANCE = 1e-5
"""float32: the adapter's part is added to the base's in another order."""


@dataclass(frozen=True)
class Mode:
    name: str
    training: bool
    grad: bool
    inputs_want_gradients: bool = False


INFERENCE = Mode("eval", training=False, grad=False)
TRAINING = Mode("train", training=True, grad=True)
INSIDE = Mode("train, inside of a larger model", training=True, grad=True, inputs_want_gradients=True)
EVALUATION = Mode("eval with gradients", training=False, grad=True, inputs_want_gradients=True)


@dataclass(frozen=True)
class Step:
    """One call: how its arguments are made, what happens before it, and in which mode."""

    name: str
    arguments: Callable[[], Call]
    mode: Mode
    before: Callable[[nn.Module], None] = lambda module: None
    seed: int = 0


@dataclass
class Trace:
    """What one call left behind."""

    facts: dict[str, Any] = field(default_factory=dict)

    def difference(self, other: Trace, apart_from: Sequence[str] = ()) -> str | None:
        """Return the first difference to the other trace; gradients may be off by the last digits."""
        for name, fact in self.facts.items():
            tolerance = GRADIENT_TOLERANCE if "gradient" in name else 0.0
            reason = None if name in apart_from else difference(fact, other.facts[name], name, tolerance)
            if reason is not None:
                return reason
        return None


def run(model: nn.Module, step: Step, outside: Callable[[], object] = lambda: None) -> Trace:
    """Make one call, with a backward where gradients are wanted, and return what it left behind."""
    model.train(step.mode.training)
    step.before(model)
    seed(step.seed)
    args, kwargs = step.arguments()
    leaves: list[Tensor] = []
    if step.mode.inputs_want_gradients:
        args, kwargs = _wanting_gradients((args, kwargs), leaves)
    given = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    trace = Trace()
    model.zero_grad()
    with torch.set_grad_enabled(step.mode.grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = model(*args, **kwargs)
            trace.facts["result"] = portrait(result, given)
            if step.mode.grad:
                _backward(result)
        except Exception as error:  # part of what is compared: the untouched module must raise it too
            trace.facts["result"] = type(error).__name__
    trace.facts["argument"] = portrait((args, kwargs), given)
    trace.facts["gradient of argument"] = portrait([leaf.grad for leaf in leaves])
    trace.facts["gradient of adapter"] = portrait({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    trace.facts["gradient of base"] = portrait({n: p.grad for n, p in model.named_parameters() if "lora_" not in n})
    trace.facts["state"] = portrait_of_state(model, parameters=False)
    trace.facts["random state"] = luck()
    trace.facts["outside"] = portrait(outside())
    return trace


def _wanting_gradients(call: Any, leaves: list[Tensor]) -> Any:
    """Return the call with computed tensors in place of its floating ones; each argument stays one object."""
    made: dict[int, Tensor] = {}

    def computed(value: Tensor) -> Tensor:
        if not (value.is_floating_point() or value.is_complex()):
            return value
        if id(value) not in made:
            leaves.append(value.detach().clone().requires_grad_())
            made[id(value)] = leaves[-1].clone(memory_format=torch.preserve_format)
        return made[id(value)]

    return pytree.tree_map_only(Tensor, computed, call)


def _backward(result: Any) -> None:
    wanted = [tensor for tensor in _tensors(result) if tensor.requires_grad]
    loss = sum((tensor.abs() if tensor.is_complex() else tensor).double().square().sum() for tensor in wanted)
    if isinstance(loss, Tensor):
        loss.backward()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif not isinstance(value, (nn.Module, torch.Generator)):
        yield from _tensors(list(getattr(value, "__dict__", {}).values()))


def seed(number: int) -> None:
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def luck() -> Any:
    """Return the state of every generator that a forward may draw from."""
    return (torch.get_rng_state().numpy().tobytes(), *luck_outside_of_torch())


def luck_outside_of_torch() -> Any:
    """Return the state of Python's and numpy's generators."""
    _, key, *position = np.random.get_state()
    return (hash(random.getstate()), key.tobytes(), position)


@dataclass(frozen=True)
class Verdict:
    """What came of one module."""

    silent: str | None
    """Where something is wrong, if it is."""
    hits: int
    calls: int
    """How many calls ran in graphs, and how many were made, of those that had been made once before."""
    reasons: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """Return "graph", or why calls ran without one; "SILENT: …" for what is never acceptable."""
        if self.silent is not None:
            return f"SILENT: {self.silent}"
        if self.hits == self.calls:
            return "graph"
        return "; ".join(self.reasons) or "no reason given"


@dataclass(frozen=True)
class Trial:
    """A module, the calls that a capture is made from, and those that it is judged on."""

    make: Callable[[], nn.Module]
    samples: Callable[[], list[Call]]
    steps: Sequence[Step]
    rule: str = "**.{first,second}"
    regions: tuple[str, ...] = ("",)
    """Paths of the modules whose whole forward is to run in a graph."""
    reset: Callable[[], None] = lambda: None
    after: Callable[[nn.Module], None] = lambda module: None
    outside: Callable[[], object] = lambda: None
    sabotage: Callable[[nn.Module], None] = lambda module: None
    """Done to the adapted model before it is judged: for tests of the judge."""


def judge(trial: Trial) -> Verdict:
    """Return the verdict on one module: B = 0 beside the frozen base, then random B beside the module backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _judge(trial)


def run_in_graphs(trial: Trial) -> None:
    """Adapt the module and make every call, and compare nothing: its graphs are known from now on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trial.make()
        trial.reset()
        seed(0)
        record(_in_graphs(model, trial)[1], trial)


def _in_graphs(model: nn.Module, trial: Trial) -> tuple[lora_fx.Plan, nn.Module]:
    samples = [lora_fx.call(*args, **kwargs) for args, kwargs in trial.samples()]
    plan = lora_fx.plan(model, rules(trial.rule, r=2), samples)
    return plan, lora_fx.apply(model, plan, optimise=False)  # which are compared bit by bit


def _judge(trial: Trial) -> Verdict:
    model = trial.make()
    trial.reset()
    seed(0)
    before = (portrait_of_state(model), luck_outside_of_torch())
    plan, graph = _in_graphs(model, trial)
    modules = lora_fx.apply(model, plan, backend="modules")
    after = (portrait_of_state(model), luck_outside_of_torch())
    silent = difference(after, before, "after apply")
    twins = [copy.deepcopy(model) for model in (graph, modules)]
    trial.sabotage(graph)
    base = trial.make().requires_grad_(False)
    expected, by_graphs = record(base, trial), record(graph, trial)
    if any(isinstance(trace.facts["result"], str) for trace in by_graphs.traces):
        expected = record(modules, trial)  # an error in a backward that the frozen base has not got
    silent = silent or first_difference(by_graphs, expected, trial, "B = 0 beside the base", ("gradient of adapter",))
    for twin in twins:
        randomise_(twin)
    graphs, plain = (record(twin, trial) for twin in twins)
    silent = silent or first_difference(graphs, plain, trial, "graph beside modules")
    return Verdict(silent, by_graphs.hits, by_graphs.calls, _reasons(plan, graph, trial))


@dataclass
class Recording:
    """The traces of a model's calls, and how many of those that were made before ran in graphs."""

    traces: list[Trace] = field(default_factory=list)
    state: Any = None
    hits: int = 0
    calls: int = 0


def record(model: nn.Module, trial: Trial) -> Recording:
    """Make every call of a trial, from the beginning."""
    trial.reset()
    recording = Recording()
    made: set[tuple[str, str]] = set()
    for step in trial.steps:
        hits, misses = _counts(model, trial)
        recording.traces.append(run(model, step, trial.outside))
        if (step.name, step.mode.name) in made:
            hits_now, misses_now = _counts(model, trial)
            recording.calls += 1
            recording.hits += hits_now > hits and misses_now == misses
        made.add((step.name, step.mode.name))
    trial.after(model)
    recording.state = portrait_of_state(model)
    return recording


def _counts(model: nn.Module, trial: Trial) -> tuple[int, int]:
    """Return hits and misses of the regions that are meant; a graph of one linear inside them does not count."""
    judged = [region for path, _, region in regions(model) if path in trial.regions]
    return sum(region.hits for region in judged), sum(sum(region.misses.values()) for region in judged)


def first_difference(
    one: Recording, other: Recording, trial: Trial, what: str, apart_from: Sequence[str] = ()
) -> str | None:
    """Return the first call that left something else behind, and what."""
    for number, (a, b, step) in enumerate(zip(one.traces, other.traces, trial.steps, strict=True)):
        reason = a.difference(b, apart_from)
        if reason is not None:
            return f"{what}, call {number} ({step.name}, {step.mode.name}): {reason}"
    reason = difference(one.state, other.state, "state")
    return None if reason is None else f"{what}, after the calls: {reason}"


def _reasons(plan: lora_fx.Plan, tuned: nn.Module, trial: Trial) -> tuple[str, ...]:
    """Return why calls ran without a graph, as the plan and the report name it."""
    planned = [region.reason for region in plan.regions if region.path in trial.regions]
    reports = [region for region in lora_fx.inspect(tuned).regions if region.path in trial.regions]
    failures = [failure for region in reports for failure in region.failures]
    misses = [miss for region in reports for miss in region.misses]
    return tuple(dict.fromkeys(reason for reason in (*planned, *failures, *misses) if reason))
