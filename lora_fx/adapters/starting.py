"""Where adapters start that are made from more than random numbers: from parts of their weights, or from data."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.adapters.factors.decompositions import Factors, decomposed
from lora_fx.adapters.factors.lora import as_rows
from lora_fx.adapters.factors.moved import MovedFactor
from lora_fx.errors import RefusedError
from lora_fx.models.quantised import dense
from lora_fx.models.shards import unsharded
from lora_fx.planning.plan import Plan
from lora_fx.progress.steps import step
from lora_fx.rules.inits import FRESH, FROM_DATA


def values_of(first_values: object) -> Mapping[str, Factors]:
    """Return the A and B that a plan carries, by the paths of their sites."""
    return first_values if isinstance(first_values, Mapping) else {}


def start_adapters(twin: nn.Module, plan: Plan, first_values: object = None) -> None:
    """Give adapters of a plan that start at parts of their weights, or at values from data, these, in place.

    On the meta device nothing has values.
    """
    values = values_of(first_values)
    if {planned.lora.init for planned in plan.adapted if planned.lora is not None} <= {*FRESH}:
        return
    names = plan.adapters
    made = [(path, a) for path, a in all_attached(twin) if a.spec.lora.init not in FRESH and a.spec.adapter in names]
    if made:
        with step("first values", len(made), "sites") as doing:
            for path, adapter in made:
                if adapter.spec.lora.init in FROM_DATA:
                    begin_at(adapter, values[adapter.spec.path])
                else:
                    start_from_weight(adapter)
                doing.advance(path)


def start_from_weight(adapter: Attached) -> None:
    """Let an adapter start at parts of its weight, in place."""
    spec = adapter.spec
    if adapter.lora_A.weight.is_meta:
        return
    weight = weight_of(adapter)
    if weight.shape != spec.site.features or not weight.is_floating_point():
        found = f"{weight.dtype} {list(weight.shape)} in place of {list(spec.site.features)}"
        raise RefusedError(f"init {spec.lora.init} needs the numbers of the weights", [(spec.path, found)])
    begin_at(adapter, decomposed(spec.lora.init, weight, spec.lora.r, spec.scaling))


def begin_at(adapter: Attached, values: Factors) -> None:
    """Give the factors of an adapter their first values, in place; a moved one starts at them."""
    for factor, value in zip((adapter.lora_A, adapter.lora_B), values, strict=True):
        if isinstance(factor, MovedFactor):
            factor.begin(value)
        else:
            with torch.no_grad():
                factor.weight.copy_(value)


def weight_of(adapter: Attached) -> Tensor:
    """Return the base weight of an adapter as plain numbers [out, in], on the device of the adapter."""
    rows: Tensor = as_rows(dense(unsharded(adapter.base_weight)), adapter.spec.site.layout)
    return rows.detach().to(adapter.lora_A.weight.device)
