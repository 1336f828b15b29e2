"""The mean gradient of a loss for the weights of sites, a few weights at a time; the model stays unchanged."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.models.quantised import is_quantised
from lora_fx.models.samples import Sample
from lora_fx.planning.planned import PlannedSite
from lora_fx.progress.steps import step
from lora_fx.regions.survey import trial_twin

Loss = Callable[[Any, Any], Tensor]
Made = TypeVar("Made")
TOGETHER = 2**28
"""Numbers in the gradients that are there at once, unless one weight has more."""


def gradients_of(
    model: nn.Module,
    sites: Sequence[PlannedSite],
    batches: Sequence[Sample],
    loss: Loss | None,
    who: str,
    made: Callable[[PlannedSite, Tensor], Made],
) -> dict[str, Made]:
    """Return what `made` makes of the mean gradient for each site's weight, as it is stored, by the site's path.

    A twin runs in eval mode, once for all batches and each group of weights.

    Args:
        model: stays unchanged.
        sites: whose weights are meant.
        batches: each is run once for a group.
        loss: of output and batch, a scalar; None: `output.loss`.
        who: needs it, for errors.
        made: is called with a site and its gradient, which is gone afterwards.

    Raises:
        RefusedError: a weight is no tensor of numbers, the loss no scalar with a gradient, or a gradient does not reach
            a weight; names every such site.
    """
    if not sites:
        return {}
    results: dict[str, Made] = {}
    with trial_twin(model) as twin, torch.enable_grad():
        twin.eval()
        weights = _weights(twin, sites, who)
        groups = list(_groups(sites, weights))
        with step("gradients", len(groups) * len(batches), "batches") as doing:
            for group in groups:
                own = {site.path: weights[site.path] for site in group}
                for weight in own.values():
                    weight.requires_grad_(True)
                for batch in batches:
                    value = loss_of(twin(*batch.args, **batch.kwargs), batch, loss, who)
                    value.backward()  # type: ignore[no-untyped-call]
                    doing.advance()
                results |= _taken(group, own, len(batches), made)
    return {site.path: results[site.path] for site in sites}


def _taken(
    group: Sequence[PlannedSite],
    weights: dict[str, nn.Parameter],
    batches: int,
    made: Callable[[PlannedSite, Tensor], Made],
) -> dict[str, Made]:
    unreached = [(path, "no gradient reaches its weight") for path, weight in weights.items() if weight.grad is None]
    if unreached:
        raise RefusedError("the data does not show enough of these", unreached, "give other data, or leave them out")
    with torch.no_grad():
        results = {
            site.path: made(site, weight.grad.detach() / batches)
            for site in group
            if (weight := weights[site.path]).grad is not None
        }
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    return results


def _weights(twin: nn.Module, sites: Sequence[PlannedSite], who: str) -> dict[str, nn.Parameter]:
    """Return the twin's own parameters of the sites: the caller's share their memory alone.

    Of a tied weight each site gets a parameter of its own, in place: its adapter changes that use of it alone.
    """
    weights: dict[str, nn.Parameter] = {}
    quantised = []
    users = Counter(id(parameter) for _, parameter in twin.named_parameters(remove_duplicate=False))
    for site in sites:
        owner, name = twin.get_submodule(site.site.owner), site.site.weight.rpartition(".")[2]
        weight = owner._parameters[name]
        if isinstance(weight, nn.Parameter) and users[id(weight)] > 1 and not is_quantised(weight):
            weight = owner._parameters[name] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or is_quantised(weight):
            quantised.append((site.path, "its weight is quantised"))
        elif weight.is_meta:
            quantised.append((site.path, "its weight has no values here"))
        else:
            weights[site.path] = weight
    if quantised:
        raise RefusedError(f"{who} needs gradients of the weights", quantised)
    return weights


def _groups(sites: Sequence[PlannedSite], weights: dict[str, nn.Parameter]) -> Iterator[list[PlannedSite]]:
    """Yield the sites in groups whose weights have few enough numbers; what shares one is together."""
    group: list[PlannedSite] = []
    numbers = 0
    by_weight: dict[int, list[PlannedSite]] = {}
    for site in sites:
        by_weight.setdefault(id(weights[site.path]), []).append(site)
    for sharing in by_weight.values():
        size = weights[sharing[0].path].numel()
        if group and numbers + size > TOGETHER:
            yield group
            group, numbers = [], 0
        group, numbers = [*group, *sharing], numbers + size
    yield group


def check_loss(loss: object) -> None:
    """Do nothing for what may be a loss.

    Raises:
        ValueError: it is no function.
    """
    if loss is not None and not callable(loss):
        raise ValueError(f"loss must be a function of output and batch, found {type(loss).__name__}")


def loss_of(output: Any, batch: Sample, loss: Loss | None, who: str) -> Tensor:
    """Return the loss of an output: by a function of output and batch, or the output's own.

    Raises:
        RefusedError: it is no scalar, or has no gradient where gradients are on.
    """
    value = getattr(output, "loss", None) if loss is None else loss(output, batch)
    needed = torch.is_grad_enabled()
    if not isinstance(value, Tensor) or value.numel() != 1 or (needed and not value.requires_grad):
        found = f"{type(value).__name__}" + (f" {list(value.shape)}" if isinstance(value, Tensor) else "")
        advice = "give loss=, a function of output and batch, or labels in the batches"
        raise RefusedError(f"{who} needs a loss that is a scalar with a gradient", [("found", found)], advice)
    return value
