"""An adapted model whose adapters are data alone: what formats with one graph for many adapters are made of.

The graph of an adapted model holds each scaling as a number, and each adapter's dropout, parts and name.  Here the
scaling is in B, parts are rows of zeros, and every adapter is called `default`; so the graph is the same for all
adapters of the same sites, and another adapter is other values.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.adapters.placed import base_in, placed_in
from lora_fx.errors import ExportError
from lora_fx.files.adapter.codec import scaled
from lora_fx.files.fingerprint import sample_values
from lora_fx.models.tensors import get_tensor
from lora_fx.planning.planned import PlannedSite
from lora_fx.planning.sites import CONVOLUTIONS
from lora_fx.tuned.build import build, record_in
from lora_fx.tuned.undo import removed

NAME = "default"


@dataclass(frozen=True, slots=True)
class BaseGraphParts:
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


def base_graph_parts(tuned: nn.Module) -> BaseGraphParts:
    """Return the adapted model with its adapters as data; the model itself stays unchanged.

    The scaling is in B [out, r]; an adapter of parts has r rows of A and columns of B for every part.  Of several
    adapters at one weight all have the largest rank, with zeros, and the model holds the values of the last.

    Raises:
        ExportError: DoRA and plain LoRA at one weight.
    """
    adapted = list(_numbered(tuned))
    _refuse_mixed(adapted)
    slots = {adapter.spec.path: adapter for _, adapter in sorted(adapted, key=lambda pair: pair[1].spec.rank)}
    plan = record_in(tuned).plan
    with torch.random.fork_rng(devices=[]):  # fresh factors draw numbers
        sites = tuple(_plain(planned, slots.get(planned.path)) for planned in plan.sites)
        model = build(removed(tuned), replace(plan, sites=sites)).eval()
    twins = dict(_numbered(model))
    adapters: dict[str, dict[str, Tensor]] = {name: {} for name in _names(tuned)}
    base: dict[str, Tensor] = {}
    axes: dict[str, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for key, adapter in adapted:
        twin = twins[key]
        base |= _base_values(twin, names)
        _fill(twin, adapter)
        values = {names[id(parameter)]: parameter.detach().clone() for parameter in twin.parameters()}
        adapters[adapter.spec.adapter] |= values
        if adapter.spec.site.op not in CONVOLUTIONS and not adapter.spec.site.is_banked:
            axes |= {names[id(twin.lora_A.weight)]: 0, names[id(twin.lora_B.weight)]: 1}
    _add_changed(tuned, model, next(iter(adapters.values())), base)
    model.requires_grad_(False)
    fingerprint = {adapter.spec.path: sample_values(adapter.base_weight) for _, adapter in adapted}
    return BaseGraphParts(model, adapters, base, axes, fingerprint)


def _numbered(model: nn.Module) -> Iterator[tuple[tuple[str, int | None], Attached]]:
    return (((adapter.spec.path, adapter.call), adapter) for _, adapter in all_attached(model))


def _names(tuned: nn.Module) -> list[str]:
    return sorted({adapter.spec.adapter for _, adapter in all_attached(tuned)}, key=lambda name: (name != NAME, name))


def _plain(planned: PlannedSite, slot: Attached | None) -> PlannedSite:
    """Return the planned site with scaling 1, without dropout and parts, of the rank of the adapter in it."""
    if slot is None:
        return planned
    spec, r = slot.spec, slot.spec.rank
    plain = replace(spec.lora, r=r, alpha=r, rslora=False, dropout=0.0, init="kaiming", bias=False, adapter=NAME)
    plain = replace(plain, share="none")  # other adapters may have a factor for each matrix of the bank
    return replace(planned, site=spec.site, decision="adapt", lora=plain, slices=None, per_call=spec.calls > 0)


def _refuse_mixed(adapted: Iterable[tuple[object, Attached]]) -> None:
    kinds: dict[str, set[bool]] = {}
    for _, adapter in adapted:
        kinds.setdefault(adapter.spec.path, set()).add(adapter.magnitude is not None)
    if mixed := [(path, "DoRA and plain LoRA") for path, found in kinds.items() if len(found) > 1]:
        raise ExportError("graph", "one graph cannot have both kinds at one weight", mixed, "name one: adapter=…")


def _base_values(fresh: Attached, names: dict[int, str]) -> dict[str, Tensor]:
    """Return zeros for the factors; a magnitude that has just been made has the lengths of the base's rows."""
    zeros = {names[id(factor)]: torch.zeros_like(factor) for factor in (fresh.lora_A.weight, fresh.lora_B.weight)}
    if fresh.magnitude is None:
        return zeros
    return {**zeros, names[id(fresh.magnitude.weight)]: fresh.magnitude.weight.detach().clone()}


@torch.no_grad()
def _fill(twin: Attached, tuned: Attached) -> None:
    rank, by_rank = tuned.spec.rank, 0 if tuned.spec.site.op in CONVOLUTIONS else -2
    A, B = twin.lora_A.weight.zero_(), twin.lora_B.weight.zero_()
    B = B.narrow(1 if tuned.spec.site.op in CONVOLUTIONS else -1, 0, rank)
    A.narrow(by_rank, 0, rank).copy_(tuned.lora_A.plain)
    B.copy_(scaled(tuned.lora_B.plain, tuned.spec.scaling).reshape(B.shape))
    lengths = tuned.lengths()
    if twin.magnitude is not None and lengths is not None:
        twin.magnitude.weight.copy_(lengths)


def _add_changed(tuned: nn.Module, model: nn.Module, values: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """Add what else training has changed: modules trained whole, biases, running statistics."""
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, before in base_in(placed_in(tuned)).items():
        now, place = get_tensor(tuned, name), get_tensor(model, name) if name in known else None
        if now is None or place is None or (torch.equal(now, before) and not isinstance(now, nn.Parameter)):
            continue
        base[name] = before.detach().clone()
        with torch.no_grad():
            place.copy_(now)
        values[name] = place.detach()
