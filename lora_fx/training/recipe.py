"""recipe: rules and a learning rate for a model and a task, as evidence has them, or as data shows."""

from collections.abc import Iterable, Sequence

from torch import nn

from lora_fx.discovery.gradients import Loss, check_loss
from lora_fx.discovery.study import CAPTURING, observed
from lora_fx.errors import RefusedError
from lora_fx.models.modes import making
from lora_fx.models.samples import batches_of, samples_for
from lora_fx.models.twin import is_meta
from lora_fx.planning.recipes import Recipe, check_task, recipe_for
from lora_fx.progress.steps import ShowProgress
from lora_fx.rules.given import is_number
from lora_fx.training.probing import LEAST_BATCHES, probe_rates

_EACH_SIDE = 4
"""Of the recipe's rate, as many more are tried, by a factor of ∜10 each."""


def recipe(
    model: nn.Module,
    task: str,
    example_inputs: object = None,
    *,
    full_lr: float | None = None,
    data: Iterable[object] | None = None,
    loss: Loss | None = None,
    rates: Sequence[float] | None = None,
    progress: ShowProgress = None,
) -> Recipe:
    """Return rules and a learning rate for a task, each with its reason and source; the model stays unchanged.

    `plan` and `apply` take `recipe.rules`; `recipe.lr` is for Adam.  The rate is ten times that of full fine-tuning.
    With data it is the one of nine rates around it (or of `rates`) whose adapter has the lowest loss on the last
    quarter of the batches, after one step on each other batch; all are trained at once, as rows of one batch, where
    each gets what it would get alone, and one after the other elsewhere (`recipe.probe.how` says which and why).

    >>> import lora_fx
    >>> block = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> made = lora_fx.recipe(nn.Sequential(block), "instruction")
    >>> made.lr, made.rules.rules[0].lora.r
    (0.0002, 32)

    Args:
        model: as for `plan`; without data it needs no weights.
        task: "instruction", "preference", "reinforcement", "classification" or "text-to-image".
        example_inputs: as for `plan`; None: the first batch.
        full_lr: the rate by which full fine-tuning of this model goes well; None: what is usual for the task.
        data: batches, as for `plan_from_data`, four or more; twins train on them in eval mode.
        loss: of output and batch, a scalar; None: `output.loss`, which keeps jobs apart.
        rates: to try in place of the nine.
        progress: as for `plan`.

    Raises:
        RefusedError: a task without a recipe; a model without sites or a head for it; too few batches; no scalar loss;
            every rate diverges.
        ValueError: a rate that is not a positive number; a loss or rates without data.
        CaptureError: as `plan`.
    """
    check_task(task)
    rates = _checked_rates(full_lr, rates)
    if data is None and (loss is not None or rates is not None):
        raise ValueError("loss and rates are for data: give batches, or leave them out")
    batches = None if data is None else batches_of(data)
    check_loss(loss)
    if batches is not None and len(batches) < LEAST_BATCHES:
        raise RefusedError(f"probing needs {LEAST_BATCHES} batches or more, of which one in four is held out")
    if batches is not None and is_meta(model):
        raise RefusedError("probing needs the model's weights", [("found", "a model on the meta device")])
    given = batches[:1] if example_inputs is None and batches else example_inputs
    with making("recipe", progress, 4 if batches is None else 4 + CAPTURING):
        found = recipe_for(observed(model, samples_for(model, given)).inventory, task, full_lr)
        if batches is None:
            return found
        tried = [found.lr * 10 ** (at / 4) for at in range(-_EACH_SIDE, _EACH_SIDE + 1)] if rates is None else rates
        return found.probed(probe_rates(model, found.rules, batches, loss, sorted(set(tried))))


def _checked_rates(full_lr: float | None, rates: object) -> list[float] | None:
    given: list[tuple[str, object]] = [("full_lr", full_lr)] if full_lr is not None else []
    tried = list(rates) if isinstance(rates, Iterable) and not isinstance(rates, (str, bytes)) else None
    given += [("rates", rate) for rate in tried or ()]
    wrong = [f"{name} has {value!r}" for name, value in given if not is_number(value, above=0)]
    if rates is not None and tried is None:
        wrong.append(f"rates is {rates!r}, and no list of them")
    if tried == []:
        wrong.append("rates is empty")
    if wrong:
        raise ValueError(f"rates must be positive numbers: {', '.join(wrong)}")
    return tried
