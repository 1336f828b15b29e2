"""Merge into quantised weights whose codes are chosen by what the layers are given: the base's grid, or GGUF's Q4_0."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import owner_path, with_values
from lora_fx.adapters.factors.rounding import guided_codes
from lora_fx.errors import LoraFxWarning, MergeError, RefusedError
from lora_fx.models.grids import Grid, codes_of, grid_of, q4_0_grid, with_codes
from lora_fx.models.modes import making
from lora_fx.models.packed import grid_kept_by, is_packed
from lora_fx.models.quantised import dense
from lora_fx.models.wrappers import seen_through
from lora_fx.progress.steps import ShowProgress, step
from lora_fx.text import columns
from lora_fx.tuned.moments import Given, Moments, at_once, is_linear, moments_of, parted
from lora_fx.tuned.requantise import quantise_as, quantised_sites, sites_in_use
from lora_fx.tuned.switching import Adapters, chosen_for_a_while
from lora_fx.tuned.undo import merged

GridName = Literal["base", "q4_0"]
_Holds = Literal["codes", "values", "layer"]

_LITTLE = 0.7
"""Below it a tenth and more of the square of the effect is missed."""


@dataclass(frozen=True, slots=True)
class OnGrid:
    """What one merged weight has on the grid of its base; shares are of batches that were not used for rounding."""

    path: str
    kept: float
    """1 - ‖(Q - W') X‖ / ‖(W' - W) X‖: 1 is all of what the adapter does to the layer's outputs."""
    nearest: float
    """The same of the nearest codes."""
    changed: float
    """Share of the codes that are not the base's."""


@dataclass(frozen=True, slots=True)
class _Site:
    path: str
    owner: str
    name: str
    base: Tensor
    grid: Grid
    holds: _Holds
    """What the merged layer is: one with a weight of codes, one with the codes' values, or one like the base's."""

    def codes(self) -> Tensor:
        """Return the codes [out, in] of the base, as float32."""
        return codes_of(self.base) if self.holds == "codes" else self.grid.nearest(dense(self.base).float())

    def weight(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the merged layer holds, or is quantised from."""
        return with_codes(self.base, codes) if self.holds == "codes" else self.grid.values(codes).to(dtype)

    @property
    def given(self) -> Given:
        return Given(self.path, self.owner, self.base.shape[1])


def merged_on_grid(
    tuned: nn.Module,
    data: Iterable[object],
    *,
    grid: GridName = "base",
    adapters: Adapters = None,
    progress: ShowProgress = None,
) -> tuple[nn.Module, list[OnGrid]]:
    """Return the merged model, whose quantised weights have the base's scales and other codes, and what each has kept.

    The codes are rounded in GPTQ's order by the inputs that the layers have on the data, so that the outputs come near
    those of W' = W + scaling · B A; where the nearest codes come nearer, they are taken.  The adapted model stays
    unchanged; weights that are not quantised are merged as by `merge`.

    With `grid="q4_0"` every adapted weight is rounded to GGUF's Q4_0, on the scales that the base's blocks have there.
    The model is a plain one: quantised to Q4_0 by llama.cpp's tools, its adapted weights get these codes and scales.

    Args:
        tuned: an adapted model.
        data: two batches or more, each as `example_inputs` of `plan`, on the model's device: three quarters are
            rounded by, the last ones show what is kept.
        grid: "base", that of quantised weights, or "q4_0".
        adapters: as for `merge`.
        progress: as for `plan`.

    Warns:
        LoraFxWarning: at some sites less than 0.7 of the adapter's effect is kept: the inputs vary in too many
            directions, or the change is larger than the grid.

    Raises:
        RefusedError: fewer than two batches; codes that are packed, of other layers than linear ones or of a sharded
            model; rows that are no multiple of Q4_0's 32; a layer that the data does not reach.  Names every such site;
            nothing is merged.
        MergeError: as `merge`; or no weight is quantised.

    Source: Frantar et al. 2022, arXiv:2210.17323.
    """
    tuned = with_values(seen_through(tuned))
    rounding, held = parted(data)
    with chosen_for_a_while(tuned, adapters), making("merge", progress, 4):
        sites = {site.path: site for site in _sites(tuned, grid)}
        model, found = merged(tuned, stays_plain=all(site.holds != "layer" for site in sites.values())), []
        with step("choosing codes", len(sites), "weights") as doing:
            for some in at_once([site.given for site in sites.values()]):
                for path, met in moments_of(model, some, rounding, held).items():
                    site = sites[path]
                    found.append(_put(model, site, met))
                    if site.holds == "layer":
                        quantise_as(model, site.owner, tuned.get_submodule(site.owner))
                    doing.advance(site.path)
    _warn(found)
    return model, found


def _sites(tuned: nn.Module, name: GridName) -> list[_Site]:
    if name not in ("base", "q4_0"):
        raise RefusedError("no such grid", [("grid", repr(name))], 'grid="base" or grid="q4_0"')
    found = quantised_sites(tuned) if name == "base" else sites_in_use(tuned)
    if not found:
        raise MergeError("no adapter is in use: there is nothing to merge")
    sites, refused = [], []
    for path, adapter in found:
        base, owner = adapter.base_weight, owner_path(path, adapter)
        layer = tuned.get_submodule(owner)
        packed = name == "base" and is_packed(layer)
        grid = q4_0_grid(dense(base)) if name == "q4_0" else grid_kept_by(layer) if packed else grid_of(base)
        if not is_linear(tuned, owner, adapter):
            refused.append((path, f"of a {type(tuned.get_submodule(owner)).__name__}, which is not a linear layer"))
        elif grid is None:
            refused.append((path, _without_grid(base, name)))
        else:
            holds: _Holds = "values" if name == "q4_0" else "layer" if packed else "codes"
            sites.append(_Site(path, owner, adapter.spec.parameter, base, grid, holds))
    if refused:
        advice = "lora_fx.merge gives plain weights, merge(…, requantize=…) quantises them again"
        raise RefusedError("these weights have no codes that can be chosen; nothing was merged", refused, advice)
    return sites


def _without_grid(base: Tensor, name: GridName) -> str:
    if name == "base":
        return f"a {type(base).__name__}, whose codes are not written one by one"
    return f"rows of {base.shape[1]}: Q4_0 takes multiples of 32, and scales within float16"


@torch.no_grad()
def _put(model: nn.Module, site: _Site, met: Moments) -> OnGrid:
    """Give a layer of the merged model its codes, in place, and return what they keep."""
    layer = model.get_submodule(site.owner)
    target, before = layer.get_parameter(site.name).float(), dense(site.base).float()
    effect = met.held.size(target - before)

    def kept(codes: Tensor) -> float:
        return 1 - met.held.size(site.grid.values(codes) - target) / effect if effect else 1.0

    near, guided = site.grid.nearest(target), guided_codes(target, site.grid, met.rounding)
    codes = guided if kept(guided) > kept(near) else near
    weight = site.weight(codes, layer.get_parameter(site.name).dtype)
    layer._parameters[site.name] = nn.Parameter(weight, requires_grad=False)
    changed = float((codes != site.codes()).float().mean())
    return OnGrid(site.path, kept(codes), kept(near), changed)


def _warn(found: Sequence[OnGrid]) -> None:
    little = sorted((one for one in found if one.kept < _LITTLE), key=lambda one: one.kept)
    if little:
        rows = [(one.path, f"{one.kept:.0%} of the adapter's effect") for one in little[:6]]
        warnings.warn(
            f"the grid cannot hold the adapter at {len(little)} of {len(found)} weights: it is too coarse "
            "for inputs that vary in so many directions, or its range too small; the least is kept at\n"
            f"{columns(rows)}\nlora_fx.merge gives plain weights, exact",
            LoraFxWarning,
            stacklevel=3,
        )
