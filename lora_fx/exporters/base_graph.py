"""An adapted model whose adapters are data alone: what formats with one graph for many adapters are made of.

The graph of an adapted model holds each scaling as a number, and each adapter's dropout, parts and name.  Here the
scaling is in B, parts are rows of zeros, and every adapter is called `default`; so the graph is the same for all
adapters of the same sites, and another adapter is other values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.files.fingerprint import sample_values
from lora_fx.models.tensors import get_tensor
from lora_fx.planning.planned import PlannedSite
from lora_fx.planning.sites import CONVOLUTIONS
from lora_fx.tuned.build import build, record_in
from lora_fx.tuned.undo import removed

NAME = "default"


@dataclass(frozen=True, slots=True)
class Neutral:
    """The model, and all that its adapters change in it."""

    model: nn.Module
    """In eval mode, frozen; computes what the adapted model computes."""
    adapters: dict[str, dict[str, Tensor]]
    """By adapter: the values of its parameters, by their names in the model."""
    base: dict[str, Tensor]
    """Of all those names, the values with which the model computes what its base computes."""
    rank_axes: dict[str, int]
    """The axis of the rank, for factors that may have any rank in one and the same graph."""
    fingerprint: dict[str, list[float] | None]
    """A few values of each adapted base weight."""


def neutral(tuned: nn.Module) -> Neutral:
    """Return the adapted model with its adapters as data; the model itself stays unchanged."""
    found = list(_numbered(tuned))
    plan = record_in(tuned).plan
    ranks = {each.spec.path: each.spec.rank for _, each in found}
    with torch.random.fork_rng(devices=[]):  # fresh factors draw numbers
        model = build(removed(tuned), replace(plan, sites=tuple(_plain(each, ranks) for each in plan.sites))).eval()
    twins = dict(_numbered(model))
    adapters = {name: {} for name in _names(tuned)}  # type: dict[str, dict[str, Tensor]]
    base: dict[str, Tensor] = {}
    axes: dict[str, int] = {}
    names = {id(each): name for name, each in model.named_parameters()}
    for key, each in found:
        twin = twins[key]
        base |= _base_values(twin, names)
        _fill(twin, each)
        values = {names[id(parameter)]: parameter.detach() for parameter in _own(twin)}
        adapters[each.spec.adapter] |= values
        if each.spec.site.op not in CONVOLUTIONS and not each.spec.site.is_banked:
            axes |= {names[id(twin.lora_A.weight)]: 0, names[id(twin.lora_B.weight)]: 1}
    _add_changed(tuned, model, next(iter(adapters.values())), base)
    model.requires_grad_(False)
    fingerprint = {each.spec.path: sample_values(each.base_weight) for _, each in found}
    return Neutral(model, adapters, base, axes, fingerprint)


def _numbered(model: nn.Module) -> Iterator[tuple[tuple[str, int | None], Attached]]:
    return (((each.spec.path, each.call), each) for _, each in all_attached(model))


def _names(tuned: nn.Module) -> list[str]:
    return sorted({each.spec.adapter for _, each in all_attached(tuned)}, key=lambda name: (name != NAME, name))


def _plain(each: PlannedSite, ranks: dict[str, int]) -> PlannedSite:
    """Return the planned site with scaling 1, without dropout and parts."""
    if each.decision != "adapt" or each.lora is None:
        return each
    r = ranks[each.path]
    plain = replace(each.lora, r=r, alpha=r, rslora=False, dropout=0.0, init="kaiming", bias=False, adapter=NAME)
    return replace(each, lora=plain, slices=None)


def _own(found: Attached) -> Iterator[nn.Parameter]:
    yield found.lora_A.weight
    yield found.lora_B.weight
    if found.magnitude is not None:
        yield found.magnitude.weight


def _base_values(fresh: Attached, names: dict[int, str]) -> dict[str, Tensor]:
    """Return zeros for the factors; a magnitude that has just been made has the lengths of the base's rows."""
    zeros = {names[id(each)]: torch.zeros_like(each) for each in (fresh.lora_A.weight, fresh.lora_B.weight)}
    if fresh.magnitude is None:
        return zeros
    return {**zeros, names[id(fresh.magnitude.weight)]: fresh.magnitude.weight.detach().clone()}


@torch.no_grad()
def _fill(twin: Attached, tuned: Attached) -> None:
    twin.lora_A.weight.copy_(tuned.lora_A.weight)
    twin.lora_B.weight.copy_((tuned.lora_B.matrix * tuned.spec.scaling).reshape(twin.lora_B.weight.shape))
    if twin.magnitude is not None and tuned.magnitude is not None:
        twin.magnitude.weight.copy_(tuned.magnitude.weight)


def _add_changed(tuned: nn.Module, model: nn.Module, values: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """Add what else training has changed: modules trained whole, biases, running statistics."""
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, before in record_in(tuned).base.items():
        now, place = get_tensor(tuned, name), get_tensor(model, name) if name in known else None
        if now is None or place is None or (torch.equal(now, before) and not isinstance(now, nn.Parameter)):
            continue
        base[name] = before.detach().clone()
        with torch.no_grad():
            place.copy_(now)
        values[name] = place.detach()
