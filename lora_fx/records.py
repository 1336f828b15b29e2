"""From a Plan to what the adapters carry with them."""

from __future__ import annotations

from torch import Tensor, nn

from lora_fx.adapters.attach import adapter_dtype
from lora_fx.adapters.spec import AdapterSpec, ModelRecord
from lora_fx.planning import Plan, PlannedSite


def record_of(plan: Plan, model: nn.Module) -> ModelRecord:
    """Return the record that all adapters of the plan share; `model` tells which parameters were trained before."""
    return ModelRecord(
        model=plan.model,
        rules=plan.rules,
        plan=plan.to_json(),
        requires_grad=frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad),
        trained=tuple(module.path for module in plan.train),
    )


def spec_of(each: PlannedSite, record: ModelRecord, model: nn.Module) -> AdapterSpec:
    """Return what the adapter at a planned site knows of itself."""
    assert each.lora is not None
    weight = model.get_submodule(each.path).weight
    assert isinstance(weight, Tensor)
    mixed = adapter_dtype(weight) != weight.dtype
    return AdapterSpec(each.path, each.op, each.lora.adapter, each.rule or "", each.lora, mixed, record)
