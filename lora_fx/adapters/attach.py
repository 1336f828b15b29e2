"""Put an adapter's modules beside a base weight, find them again, and take them away."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapters.dora import DoRAMagnitude, row_norms
from lora_fx.adapters.initialise import initialise
from lora_fx.adapters.lora import LoRAFactor
from lora_fx.adapters.spec import AdapterSpec
from lora_fx.swap import unswap

CHILDREN = ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")
ACTIVE = "lora_fx_active"
"""Attribute of an adapted module: name of the adapter that its forward uses, None while disabled."""
BASE_WEIGHT = "base_weight"
"""Attribute that gives the base weight of a module which shows an effective weight as its `weight`."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Attached:
    """One adapter where it sits: the module that owns the base weight, and the factors beside it."""

    owner: nn.Module
    spec: AdapterSpec
    lora_A: LoRAFactor
    lora_B: LoRAFactor
    dropout: nn.Module | None
    magnitude: DoRAMagnitude | None

    @property
    def base_weight(self) -> Tensor:
        """The base weight W itself, also where the owner shows an effective weight instead."""
        weight = self.owner._parameters["weight"]
        assert weight is not None
        return weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that belong to the adapter: A and B, and the site's bias if the rule trains it."""
        yield self.lora_A.weight
        yield self.lora_B.weight
        if self.magnitude is not None:
            yield self.magnitude.weight
        if self.spec.lora.bias and isinstance(self.owner.bias, nn.Parameter):
            yield self.owner.bias


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of an adapter's parameters: the base's own, but float32 for half precision and quantised bases.

    A learning rate that suits LoRA moves bfloat16 parameters by less than their last bit.
    """
    return weight.dtype if weight.is_floating_point() and weight.dtype not in _HALF else torch.float32


def attach(owner: nn.Module, weight: Tensor, shape: tuple[int, ...], spec: AdapterSpec) -> Attached:
    """Add freshly initialised factors to the owner of a base weight; no key of the owner changes.

    Adds `lora_A.<adapter>.weight` [r, in] and `lora_B.<adapter>.weight` [out, r]; where the rule asks for it a
    parameterless `lora_dropout.<adapter>` and, for DoRA, `lora_magnitude_vector.<adapter>.weight` [out]; all in the
    owner's mode (train or eval) and on the weight's device.
    """
    out_features, in_features = shape[0], math.prod(shape[1:])
    dtype, device = adapter_dtype(weight), weight.device
    factor_a = LoRAFactor(torch.empty(spec.lora.r, in_features, dtype=dtype, device=device), spec)
    factor_b = LoRAFactor(torch.empty(out_features, spec.lora.r, dtype=dtype, device=device))
    initialise(factor_a.weight, factor_b.weight, spec.lora.init)
    owner.lora_A = nn.ModuleDict({spec.adapter: factor_a})
    owner.lora_B = nn.ModuleDict({spec.adapter: factor_b})
    if spec.lora.dropout:
        owner.lora_dropout = nn.ModuleDict({spec.adapter: nn.Dropout(spec.lora.dropout)})
    if spec.lora.dora:
        norms = row_norms(weight, factor_a.weight, factor_b.weight, spec.scaling).to(dtype)
        owner.lora_magnitude_vector = nn.ModuleDict({spec.adapter: DoRAMagnitude(norms, spec.scaling)})
    for name in CHILDREN:
        if name in owner._modules:
            owner._modules[name].train(owner.training)  # type: ignore[union-attr]
    found = attached(owner)
    assert found is not None
    return found


def attached(owner: nn.Module) -> Attached | None:
    """Return the adapter beside the owner's weight, or None."""
    factors = owner._modules.get("lora_A")
    if factors is None:
        return None
    for name, factor in factors._modules.items():
        if isinstance(factor, LoRAFactor) and factor.spec is not None:
            return Attached(owner, factor.spec, factor, *_partners(owner, name))
    return None


def _partners(owner: nn.Module, adapter: str) -> tuple[LoRAFactor, nn.Module | None, DoRAMagnitude | None]:
    found = [None if (each := owner._modules.get(name)) is None else each._modules[adapter] for name in CHILDREN[1:]]
    lora_b, dropout, magnitude = found
    assert isinstance(lora_b, LoRAFactor)
    assert magnitude is None or isinstance(magnitude, DoRAMagnitude)
    return lora_b, dropout, magnitude


def shows_effective_weight(owner: nn.Module) -> bool:
    """Whether the module's `weight` is computed, not the parameter of that name."""
    return isinstance(inspect.getattr_static(type(owner), "weight", None), property)


def base_weight_name(owner: nn.Module) -> str:
    """Return the attribute that gives the base weight."""
    return BASE_WEIGHT if shows_effective_weight(owner) else "weight"


def share_adapter(owner: nn.Module, other: nn.Module) -> None:
    """Let another module hold the adapter of the owner too, in place: the same modules."""
    for name in CHILDREN:
        if name in owner._modules:
            other.add_module(name, owner._modules[name])


def all_attached(model: nn.Module) -> Iterator[tuple[str, Attached]]:
    """Yield (path, adapter) for every adapter in the model, in model order; a shared module once."""
    for path, module in model.named_modules():
        found = attached(module)
        if found is not None:
            yield path, found


def detach(owner: nn.Module) -> None:
    """Take the adapter away from the owner and give it its own class back, in place; the base weight stays."""
    unswap(owner)
    owner.__dict__.pop(ACTIVE, None)
    for name in CHILDREN:
        owner._modules.pop(name, None)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model holds an adapter of ours."""
    return next(all_attached(model), None) is not None
