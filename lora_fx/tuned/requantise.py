"""Merge into quantised weights on request: what quantising the merged weights again takes from the adapter."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, owner_path
from lora_fx.errors import LoraFxWarning, MergeError
from lora_fx.models.fsdp import refuse_sharded, resharded, sharding_of, take_apart
from lora_fx.models.packed import held_weight, is_packed, quantised_alike, take_hooks
from lora_fx.models.quantised import dense, is_quantised
from lora_fx.models.resharding import sharded_again
from lora_fx.models.shards import gather_held, part_held, whole
from lora_fx.passes.merge import used_at
from lora_fx.progress.steps import step
from lora_fx.text import columns, dotted
from lora_fx.tuned.build import record_in
from lora_fx.tuned.undo import merged

Quantise = Callable[[nn.Module], object] | Literal["same"]
"""Quantises every linear in a module, in place: `lambda module: quantize_(module, Int8WeightOnlyConfig())`.

"same": with the settings that the base's layer has (bitsandbytes', compressed-tensors', hqq's).
"""


@dataclass(frozen=True, slots=True)
class Requantised:
    """What quantising one merged weight has cost."""

    path: str
    largest: float
    """max |Q(W') - W'|."""
    share: float
    """‖Q(W') - W'‖ / ‖W' - W‖: how much of what the adapter does is lost, or drowned; 1 is as large as all of it."""


def merged_and_requantised(tuned: nn.Module, quantise: Quantise) -> tuple[nn.Module, list[Requantised]]:
    """Return the merged model with its once quantised weights quantised again, and what that cost at each site.

    Of a sharded model each weight is gathered by itself, on every process, and its codes are sharded as they were.

    Raises:
        MergeError: nothing was quantised, or the function does not quantise a merged layer; "same", and a layer does
            not tell its settings.
        ValueError: neither "same" nor a function.
    """
    if quantise != "same" and not callable(quantise):
        raise ValueError(f'requantize is {quantise!r}; it must be "same", or a function that quantises a module')
    if quantise != "same":
        refuse_sharded(tuned, "a function quantises whole layers, and each process has a part", 'requantize="same"')
    sites = quantised_sites(tuned, parts=True)
    _refuse_unknown_settings(tuned, sites, quantise)
    model = merged(tuned, stays_plain=False)
    how = sharding_of(resharded(model))
    if how is not None:
        take_apart(model, how)
    costs = []
    with step("quantising", len(sites), "weights") as doing:
        for path, adapter in sites:
            owner, name = owner_path(path, adapter), adapter.spec.parameter
            part, like = model.get_parameter(dotted(owner, name)), tuned.get_submodule(owner)
            exact = whole(part)
            gather_held(model.get_submodule(owner))
            again = _quantised_again(model, owner, name, partial(_alike, like) if quantise == "same" else quantise)
            costs.append(_cost(path, dense(adapter.base_weight), exact, dense(again)))
            if how is not None:
                layer = model.get_submodule(owner)
                part_held(layer, part, [held for held in layer._parameters if dotted(owner, held) in how.apart])
            doing.advance(path)
    return sharded_again(model), costs


def quantised_sites(tuned: nn.Module, parts: bool = False) -> list[tuple[str, Attached]]:
    """Return the path of each quantised weight whose adapters are in use, with one of its adapters.

    Raises:
        MergeError: there is none.
        RefusedError: processes hold parts of the model, and are not asked for `parts`.
    """
    sites = [(path, adapter) for path, adapter in sites_in_use(tuned, parts) if is_quantised(adapter.base_weight)]
    if not sites:
        advice = 'lora_fx.merge(tuned) is for plain weights; lora_fx.merged_on_grid(…, grid="q4_0") rounds those'
        raise MergeError(
            "no weight whose adapters are in use is quantised: there is nothing to quantise again", advice=advice
        )
    return sites


def sites_in_use(tuned: nn.Module, parts: bool = False) -> list[tuple[str, Attached]]:
    """Return the path of each weight whose adapters are in use, with one of its adapters.

    Raises:
        RefusedError: the model is not adapted, or processes hold parts of it, and are not asked for `parts`.
    """
    record_in(tuned)
    if not parts:
        advice = 'merge(…, requantize="same"), or lora_fx.save, and beside the base that is not sharded'
        refuse_sharded(tuned, "codes of a sharded model are not chosen by its inputs", advice)
    return [
        (path if used[0][0].spec.path_is_owner else dotted(path, used[0][0].spec.parameter), used[0][0])
        for path, owner in tuned.named_modules()
        for used in used_at(owner).values()
    ]


def _refuse_unknown_settings(tuned: nn.Module, sites: list[tuple[str, Attached]], quantise: Quantise) -> None:
    unknown = [
        (path, f"a {type(adapter.base_weight).__name__} does not tell how it was quantised")
        for path, adapter in sites
        if quantise == "same" and not is_packed(tuned.get_submodule(owner_path(path, adapter)))
    ]
    if unknown:
        advice = "give a function: requantize=lambda module: quantize_(module, Int8WeightOnlyConfig())"
        raise MergeError("these weights cannot be quantised as they were; nothing was merged", unknown, advice)


def quantise_as(model: nn.Module, path: str, like: nn.Module) -> None:
    """Quantise one plain layer of the model as a packed layer is, in place."""
    _quantised_again(model, path, "weight", partial(_alike, like))


def _alike(like: nn.Module, shell: nn.Module) -> None:
    """Quantise the one layer in a shell as another one is, in place."""
    layer = shell.get_submodule("0")
    weight = layer.get_parameter("weight")
    again = quantised_alike(like, weight)
    again.train(layer.training)
    bias = layer._parameters["bias"]
    if "bias" in vars(again):  # hqq's, which is no parameter
        vars(again)["bias"] = None if bias is None else bias.detach()
    else:
        again._parameters["bias"] = bias
    take_hooks(again, layer)
    shell.add_module("0", again)


def _quantised_again(model: nn.Module, path: str, name: str, quantise: Callable[[nn.Module], object]) -> Tensor:
    """Quantise one layer of the model, in place, and return its weight."""
    shell = nn.Sequential(model.get_submodule(path))
    quantise(shell)
    layer = shell[0]
    if path:
        model.set_submodule(path, layer)
    weight = held_weight(layer, name) if is_packed(layer) else layer._parameters.get(name)
    if weight is None or not is_quantised(weight):
        raise MergeError("the merged weight is as plain as before", [(path, "`requantize` has not quantised it")])
    return weight


def _cost(path: str, base: Tensor, exact: Tensor, again: Tensor) -> Requantised:
    lost, change = (again.float() - exact.float()), (exact.float() - base.float())
    return Requantised(path, float(lost.abs().max()), float(lost.norm() / change.norm().clamp(min=1e-30)))


def warn_of_costs(costs: list[Requantised]) -> None:
    """Say at which sites quantising again took the most."""
    worst = sorted(costs, key=lambda cost: -cost.share)[:6]
    rows = [(cost.path, f"max |Δ| {cost.largest:.2g}", f"{cost.share:.0%} of the adapter's change") for cost in worst]
    warnings.warn(
        f"quantising {len(costs)} merged weights again has changed them; the most:\n{columns(rows)}",
        LoraFxWarning,
        stacklevel=3,
    )
