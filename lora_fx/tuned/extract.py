"""extract: the adapter between two checkpoints, the best of its rank: a truncated SVD of each difference of weights."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.adapters.adapt import trained_parameters
from lora_fx.adapters.attach import Attached, adapted_owners, all_attached, is_adapted
from lora_fx.adapters.placed import is_trained, placed_in
from lora_fx.discovery.sites import take_inventory
from lora_fx.errors import LoraFxWarning, RefusedError
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.offload import offloading_hook, stored_weight
from lora_fx.models.packed import held_weight, is_packed
from lora_fx.models.quantised import dense
from lora_fx.models.tensors import dotted, get_tensor
from lora_fx.planning.decide import decide, on_modules
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedSite
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.progress.steps import step
from lora_fx.rules.inits import FRESH
from lora_fx.rules.patterns import glob_of
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet
from lora_fx.text import columns, count
from lora_fx.tuned.build import build, check_refusals

Rules: TypeAlias = "Mapping[str, object] | str | os.PathLike[str] | RuleSet | None"


@dataclass(frozen=True, slots=True)
class ExtractedSite:
    """One linear: how much of the difference of its weights the adapter has."""

    path: str
    r: int
    norm: float
    """‖W_tuned - W_base‖, the Frobenius norm."""
    retained: float
    """Σ of the r largest σ² / Σ of all σ²; 1 if the weights do not differ."""


@dataclass(frozen=True, slots=True, repr=False)
class ExtractReport(InNotebook):
    """What an extracted adapter has of the difference between two models, and what it lacks."""

    sites: tuple[ExtractedSite, ...]
    lost: tuple[tuple[str, float], ...]
    """(name, norm of the difference) of every parameter and buffer that differs and is in no adapter."""

    @property
    def retained(self) -> float:
        """The share of the squared difference of all adapted weights that the adapter has."""
        total = sum(site.norm**2 for site in self.sites)
        return sum(site.retained * site.norm**2 for site in self.sites) / total if total else 1.0

    def __str__(self) -> str:
        rows = [(site.path, f"r={site.r}", f"retained {site.retained:.4f}") for site in self.sites]
        rows += [(name, "", f"lost, ‖Δ‖ = {norm:.3g}") for name, norm in self.lost]
        kept = f"retained {self.retained:.4f} in all"
        return f"{count(len(self.sites), 'site')} · {kept} · {count(len(self.lost), 'tensor')} lost\n\n{columns(rows)}"


def extracted(
    tuned_full: nn.Module, base: nn.Module, r: int = 8, rules: Rules = None
) -> tuple[nn.Module, ExtractReport]:
    """Return the adapted twin of `base` nearest to `tuned_full`, and the report; both models stay unchanged.

    See `lora_fx.extract`, which returns the twin alone.

    Raises:
        RefusedError: as `lora_fx.extract`.
        RuleError, NoMatchError: as `lora_fx.plan`.
    """
    _check(tuned_full, base)
    differing = _differing(tuned_full, base)
    plan = _plan(base, r, rules, differing)
    twin = build(base, plan)
    sites: list[ExtractedSite] = []
    attached = list(all_attached(twin))
    with step("decomposing", len(attached), "differences", share=4) as doing:
        for path, adapter in attached:
            sites.append(_fill(path, adapter, tuned_full, base))
            doing.advance(path)
    _take_over_trained(twin, tuned_full)
    lost = tuple((name, norm) for name, norm in differing.items() if name not in _taken(twin))
    return twin, ExtractReport(tuple(sites), lost)


def warn_of_losses(report: ExtractReport) -> None:
    """Warn of everything that differs and that the adapter does not have."""
    if report.lost:
        rows = columns([(name, f"‖Δ‖ = {norm:.3g}") for name, norm in report.lost])
        warnings.warn(
            f"{len(report.lost)} tensors differ and are in no adapter; these changes are lost:\n{rows}",
            LoraFxWarning,
            stacklevel=3,
        )


# -- what differs


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their names; of layers that hold codes what these stand for."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    packed = (pair for pair in model.named_modules(remove_duplicate=False) if is_packed(pair[1]))
    return tensors | {dotted(path, "weight"): held_weight(layer, "weight") for path, layer in packed}


def _value(model: nn.Module, name: str) -> Tensor:
    """Return one of them with its values, of which one at a time is read where they are offloaded."""
    path, _, last = name.rpartition(".")
    return stored_weight(model.get_submodule(path), last)


def _without_values(model: nn.Module) -> list[tuple[str, str]]:
    """Return what is on the meta device and offloaded nowhere, each with that it has no values."""
    names = [name for name, tensor in _tensors(model).items() if tensor.is_meta]
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return [(name, "has no values") for name, owner in owners.items() if offloading_hook(owner) is None]


def _check(tuned_full: nn.Module, base: nn.Module) -> None:
    """Raise RefusedError if the two are not two checkpoints of one architecture, or have no values."""
    if is_adapted(tuned_full) or is_adapted(base):
        which = "tuned" if is_adapted(tuned_full) else "base"
        raise RefusedError(f"the {which} model has an adapter", advice="lora_fx.merge or lora_fx.remove it before")
    for model in (tuned_full, base):
        refuse_sharded(
            model, "processes hold parts of this model, and not its differences", "extract before fully_shard"
        )
    lost = _without_values(tuned_full) or _without_values(base)
    if lost:
        raise RefusedError("on the meta device: there are no values to compare", lost)
    ours, theirs = _tensors(base), _tensors(tuned_full)
    problems = [(name, "only in the base") for name in ours if name not in theirs]
    problems += [(name, "only in the tuned model") for name in theirs if name not in ours]
    problems += [
        (name, f"base {tuple(ours[name].shape)}, tuned {tuple(theirs[name].shape)}")
        for name in ours
        if name in theirs and ours[name].shape != theirs[name].shape
    ]
    if problems:
        raise RefusedError("the two models are not of one architecture", problems)


def _differing(tuned_full: nn.Module, base: nn.Module) -> dict[str, float]:
    """Return the norm of the difference for every tensor that differs.

    Raises:
        RefusedError: naming each, if a difference is not finite; or if there is none.
    """
    names = list(_tensors(base))
    norms = {name: float(difference(_value(tuned_full, name), _value(base, name)).norm()) for name in names}
    bad = [(name, "NaN or infinite") for name, norm in norms.items() if not norm < float("inf")]
    if bad:
        raise RefusedError("the difference of the two models has values that are not finite", bad)
    return {name: norm for name, norm in norms.items() if norm}


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """Return tuned - base in float32 (float64 where one of them is), on the device of the base; both stay unchanged."""
    wide = torch.float64 if torch.float64 in (tuned.dtype, base.dtype) else torch.float32
    return dense(tuned.detach()).to(base.device, wide) - dense(base.detach()).to(wide)


# -- which sites


def _plan(base: nn.Module, r: int, rules: Rules, differing: dict[str, float]) -> Plan:
    given = _all_that_differ(base, r, differing) if rules is None else rules
    plan = on_modules(decide(read_rules(given), take_inventory(base)))
    check_refusals(plan)
    if plan.tokens:
        facts = [(rows.weight, f"{len(rows.ids)} rows") for rows in plan.tokens]
        raise RefusedError("rows of embeddings are not extracted", facts, "`train:` takes the whole embedding over")
    problems = [(site.path, reason) for site in plan.adapted if (reason := _unfit(base, site)) is not None]
    if problems:
        raise RefusedError("some sites cannot be extracted", problems)
    return plan


def _all_that_differ(base: nn.Module, r: int, differing: dict[str, float]) -> Mapping[str, object]:
    """Return rules for every linear whose weight differs, with a scaling of 1."""
    linears = [path for path, module in base.named_modules() if path and isinstance(module, nn.Linear)]
    changed = [glob_of(path) for path in linears if f"{path}.weight" in differing]
    if not changed:
        raise RefusedError("no linear differs between the two models: there is nothing to extract")
    rule = {"name": "extract", "match": {"name": changed}, "lora": {"r": r, "alpha": r}}
    return {"version": 1, "rules": [rule]}


def _unfit(base: nn.Module, site: PlannedSite) -> str | None:
    if site.slices is not None or (site.lora is not None and site.lora.dora):
        return "only plain LoRAs are extracted: no dora, no slices"
    if site.lora is not None and site.lora.invocation:
        return "the weights of two models differ for every token: leave out `invocation`"
    if site.lora is not None and site.lora.init not in FRESH:
        return f"what is extracted has no first values: leave out `init: {site.lora.init}`"
    owner = dict(base.named_modules(remove_duplicate=False)).get(site.path)
    return None if isinstance(owner, nn.Linear) else f"op {site.op}: only linears are extracted"


# -- values


def _fill(path: str, adapter: Attached, tuned_full: nn.Module, base: nn.Module) -> ExtractedSite:
    """Give the adapter the best values of its rank, in place."""
    ours, theirs = (stored_weight(model.get_submodule(path), "weight") for model in (base, tuned_full))
    delta, r = difference(theirs, ours), adapter.spec.lora.r
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    kept = min(r, len(values))
    roots = (values[:kept] / abs(adapter.spec.scaling)).sqrt()
    sign = 1.0 if adapter.spec.scaling > 0 else -1.0
    missing = r - kept  # of a matrix with fewer singular values than the adapter has columns
    with torch.no_grad():
        adapter.lora_A.weight.copy_(F.pad(roots.unsqueeze(1) * right[:kept], (0, 0, 0, missing)))
        adapter.lora_B.weight.copy_(F.pad(sign * left[:, :kept] * roots, (0, missing)))
    energies = values.double().square()
    total = float(energies.sum())
    retained = float(energies[:kept].sum()) / total if total else 1.0
    return ExtractedSite(path, r, total**0.5, retained)


def _taken(twin: nn.Module) -> set[str]:
    """Return the names of the tensors of the base whose change the adapted model has, as far as its rank goes."""
    owners, modules = set(adapted_owners(twin)), twin.named_modules(remove_duplicate=False)
    return {f"{path}.weight" for path, module in modules if module in owners} | set(_trained(twin))


def _trained(twin: nn.Module) -> list[str]:
    """Return the names of what is trained whole and saved with the adapter, buffers of modules under `train:` too."""
    places, buffers = placed_in(twin), twin.named_buffers(remove_duplicate=False)
    return [*trained_parameters(twin), *(name for name, _ in buffers if is_trained(name, places))]


def _take_over_trained(twin: nn.Module, tuned_full: nn.Module) -> None:
    """Give what is trained whole the tuned model's values, in place."""
    for name in _trained(twin):
        own = get_tensor(twin, name)
        assert own is not None
        with torch.no_grad():
            own.copy_(_value(tuned_full, name))
