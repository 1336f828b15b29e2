"""Learning rates tried on data: a job for each, from the same first values on the same batches; the model stays.

All jobs are rows of one batch (`lora_fx.rows`) where that gives each what it would get alone; else one after the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_fx.discovery.gradients import Loss, loss_of
from lora_fx.discovery.study import planned_for
from lora_fx.errors import RefusedError
from lora_fx.files.adapter.adding import add
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.samples import Sample
from lora_fx.models.torch_internals import pytree
from lora_fx.planning.plan import Plan
from lora_fx.planning.recipes import RateProbe
from lora_fx.progress.steps import step
from lora_fx.regions.program import USUAL
from lora_fx.regions.survey import unchanged_random
from lora_fx.rules.ruleset import RuleSet
from lora_fx.training.ownloss import ApartError, own_loss
from lora_fx.tuned import build
from lora_fx.tuned.optimizing import param_groups
from lora_fx.tuned.rows import rows
from lora_fx.tuned.several import rename
from lora_fx.tuned.switching import use

LEAST_BATCHES = 4
_SEED = 0
"""Of first values that are drawn: the same for all jobs."""
_WHO = "probing"
_TOGETHER = "all in one batch"
_SAME = 1e-3
"""How far a loss may differ by rounding, in float32; in half precision by a rounding of its dtype, if that is more."""


_Groups = Callable[..., list[dict[str, Any]]]
"""`param_groups`, with what is the same for all jobs."""


def probe_rates(
    model: nn.Module,
    rules_or_plan: RuleSet | Plan,
    batches: Sequence[Sample],
    loss: Loss | None,
    rates: Sequence[float],
    lora_plus: float | None = None,
) -> RateProbe:
    """Return what each rate comes to: the last quarter of the batches is held out, the others are trained on once.

    Twins run in eval mode, without dropout, with AdamW and no weight decay.  A job whose loss is not finite is stopped.

    Args:
        model: stays unchanged.
        rules_or_plan: of one adapter; a plan may bring first values from data.
        batches: of the model's inputs.
        loss: of output and batch, a scalar; None: `output.loss`.
        rates: one job for each.
        lora_plus: as for `param_groups`.

    Raises:
        RefusedError: too few batches, no scalar loss, several adapters in the rules, or every job has diverged.
        RuleError, NoMatchError, CaptureError: as `apply`.
    """
    if len(batches) < LEAST_BATCHES:
        raise RefusedError(
            f"{_WHO} needs {LEAST_BATCHES} batches or more, one in four is held out: found {len(batches)}"
        )
    example = None if isinstance(rules_or_plan, Plan) else [batches[0]]
    refuse_sharded(model, "processes hold parts of this model, and no rates are tried on it", "before fully_shard")
    plan = planned_for(model, rules_or_plan, example, "auto")
    build.check_refusals(plan)
    if len(plan.adapters) > 1:
        raise RefusedError(f"{_WHO} is for rules of one adapter", [(name, "is one") for name in plan.adapters])
    held = math.ceil(len(batches) / 4)
    parts = batches[:-held], batches[-held:]
    groups = partial(param_groups, lora_plus=lora_plus)
    with unchanged_random(model), torch.enable_grad():
        try:
            _refuse_together(plan)
            by_rows = own_loss(model, batches[0]) if loss is None else loss
            jobs = _Together(model, plan, groups, rates, loss, by_rows)
            how, (before, losses) = _TOGETHER, _run(jobs, *parts)
            jobs.refuse_mixed(parts[1][0])
        except (ApartError, RefusedError) as error:
            how = f"one after the other ({str(error).splitlines()[0]})"
        if how != _TOGETHER:
            before, losses = _run(_Apart(model, plan, groups, rates, loss), *parts)
    if not any(map(math.isfinite, losses)):
        facts = [(f"{rate:.2g}", "diverged") for rate in rates]
        raise RefusedError("no rate trains on this data", facts, "give lower rates, or look for NaN in data and model")
    return RateProbe(tuple(rates), tuple(losses), before, len(parts[0]), held, how)


class _Jobs(Protocol):
    """Adapters that are trained at rates of their own."""

    def train(self, batch: Sample) -> None: ...

    def losses(self, batch: Sample) -> list[float]: ...


def _run(jobs: _Jobs, training: Sequence[Sample], held: Sequence[Sample]) -> tuple[float, list[float]]:
    """Train, and return the loss on what is held out before, and that of each job after."""
    with step("trying rates", len(training) + 2 * len(held), "batches") as doing:
        before = _mean(jobs, held, doing.advance)[0]
        for batch in training:
            jobs.train(batch)
            doing.advance()
        return before, _mean(jobs, held, doing.advance)


def _mean(jobs: _Jobs, held: Sequence[Sample], done: Any) -> list[float]:
    sums: list[float] = []
    for batch in held:
        losses = jobs.losses(batch)
        sums = [a + b for a, b in zip(sums or [0.0] * len(losses), losses, strict=True)]
        done()
    return [one / len(held) for one in sums]


# -- each on its own twin


class _Apart:
    """A twin for each job; they share the base."""

    def __init__(
        self, model: nn.Module, plan: Plan, groups: _Groups, rates: Sequence[float], loss: Loss | None
    ) -> None:
        self.loss = loss
        self.twins = [_twin(model, plan) for _ in rates]
        self.optimizers = [
            torch.optim.AdamW(groups(twin, lr=rate)) for twin, rate in zip(self.twins, rates, strict=True)
        ]
        self.live = set(range(len(rates)))

    def train(self, batch: Sample) -> None:
        for at in sorted(self.live):
            value = loss_of(self.twins[at](*batch.args, **batch.kwargs), batch, self.loss, _WHO)
            if not torch.isfinite(value):
                self.live.discard(at)
                continue
            value.backward()  # type: ignore[no-untyped-call]
            _next(self.optimizers[at])

    @torch.no_grad()
    def losses(self, batch: Sample) -> list[float]:
        return [
            float(loss_of(twin(*batch.args, **batch.kwargs), batch, self.loss, _WHO)) if at in self.live else math.nan
            for at, twin in enumerate(self.twins)
        ]


def _next(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _twin(model: nn.Module, plan: Plan) -> nn.Module:
    """Return an adapted twin with the same first values at each call."""
    torch.manual_seed(_SEED)
    twin = build.build(model, plan)
    build.install_graphs(twin, plan, USUAL)
    return twin.eval()


# -- all in one batch


def _refuse_together(plan: Plan) -> None:
    if plan.train or any(site.lora is not None and site.lora.bias for site in plan.adapted):
        raise ApartError("modules of the model are trained too")


class _Together:
    """An adapter for each job on one twin; a batch has the rows once for each."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        groups: _Groups,
        rates: Sequence[float],
        loss: Loss | None,
        by_rows: Loss,
    ) -> None:
        self.loss, self.by_rows = loss, by_rows
        self.names = [f"rate{number}" for number in range(len(rates))]
        self.twin = _twin(model, plan)
        torch.manual_seed(_SEED)
        first = build.build(model, plan)
        rename(self.twin, plan.adapters[0], self.names[0])
        for name in self.names[1:]:
            add(self.twin, first, adapter=name)
        self.optimizers = {
            name: torch.optim.AdamW(groups(self.twin, name, lr=rate))
            for name, rate in zip(self.names, rates, strict=True)
        }
        self.live = list(self.names)

    def train(self, batch: Sample) -> None:
        if not self.live:
            return
        with self._given(batch) as losses:
            finite = {name: value for name, value in losses.items() if torch.isfinite(value)}
            if finite:
                torch.stack([value.reshape(()) for value in finite.values()]).sum().backward()  # type: ignore[no-untyped-call]
        self.live = list(finite)
        for name, optimizer in self.optimizers.items():
            if name in finite:
                _next(optimizer)

    @torch.no_grad()
    def losses(self, batch: Sample) -> list[float]:
        if not self.live:
            return [math.nan for _ in self.names]
        with self._given(batch) as losses:
            return [float(losses[name]) if name in losses else math.nan for name in self.names]

    @torch.no_grad()
    def refuse_mixed(self, batch: Sample) -> None:
        """Raise ApartError where a job's loss is another one without the rows of the others, which differ by now."""
        together = self.losses(batch)
        dtypes = {parameter.dtype for parameter in self.twin.parameters() if parameter.is_floating_point()}
        most = max([_SAME, *(torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize == 2)])
        for name, value in zip(self.names, together, strict=True):
            if name in self.live:
                with use(self.twin, name):
                    alone = loss_of(self.twin(*batch.args, **batch.kwargs), batch, self.loss, _WHO)
                if not math.isclose(value, float(alone), rel_tol=most, abs_tol=most):
                    raise ApartError("rows of one job change those of another")

    @contextmanager
    def _given(self, batch: Sample) -> Iterator[dict[str, Tensor]]:
        """Give the loss of each job that goes on, while its rows are its own."""
        size, number = _rows_of(batch), len(self.live)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda value: torch.cat([value] * number) if value.dim() else value, (batch.args, batch.kwargs)
        )
        with rows(self.twin, [name for name in self.live for _ in range(size)]):
            output = self.twin(*args, **kwargs)
            if self.loss is None:  # its own, of all rows, is nobody's
                output = SimpleNamespace(logits=output.logits)
            parts = (_part(output, at, size, number) for at in range(number))
            yield {name: loss_of(part, batch, self.by_rows, _WHO) for name, part in zip(self.live, parts, strict=True)}


def _rows_of(batch: Sample) -> int:
    """Return how many rows all tensors of a batch have.

    Raises:
        ApartError: they have different numbers of them.
    """
    sizes = {value.shape[0] for value in pytree.tree_leaves((batch.args, batch.kwargs)) if _has_rows(value)}
    if len(sizes) != 1:
        raise ApartError("tensors of a batch have different numbers of rows")
    return int(sizes.pop())


def _has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _part(output: Any, at: int, size: int, number: int) -> Any:
    """Return a job's rows of an output.

    Raises:
        ApartError: a tensor of it does not have the rows of all jobs.
    """

    def own(value: Tensor) -> Tensor:
        if not value.dim() or value.shape[0] != size * number:
            raise ApartError(f"an output is {list(value.shape)}, which does not show the rows of each job")
        return value[at * size : (at + 1) * size]

    if isinstance(output, SimpleNamespace):
        return SimpleNamespace(logits=own(output.logits))
    return pytree.tree_map_only(Tensor, own, output)
