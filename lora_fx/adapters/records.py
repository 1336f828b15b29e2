"""From a Plan to what the adapters carry with them."""

from __future__ import annotations

from torch import nn

from lora_fx.adapters.attach import adapter_dtype
from lora_fx.adapters.factors.spec import AdapterSpec, ModelRecord
from lora_fx.models.tensors import get_tensor
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedSite


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
    site = each.site
    weight = get_tensor(model, site.weight)
    assert weight is not None
    return AdapterSpec(
        path=each.path,
        op=each.op,
        adapter=each.lora.adapter,
        rule=each.rule or "",
        lora=each.lora,
        mixed=adapter_dtype(weight) != weight.dtype,
        record=record,
        shape=site.shape,
        parameter=site.weight.rpartition(".")[2],
        layout=site.layout,
        parts=() if each.slices is None else each.slices.rows(site.features[0]),
        slices=None if each.slices is None else each.slices.to_dict(),
        calls=(each.calls or 0) if each.per_call else 0,
    )
