"""The module backend: adapted modules compute base + scaling · B A dropout(x) in their own forward.

It is the meaning that the graph backend must equal, and what runs wherever a graph does not.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.attach import ACTIVE, attach, attached
from lora_fx.adapters.dora import row_norms
from lora_fx.adapters.lora import add_low_rank, low_rank_weight
from lora_fx.adapters.spec import AdapterSpec
from lora_fx.swap import Swapped, original_class, swap
from lora_fx.tensors import dotted


class AdaptedLinear(Swapped, nn.Linear):
    """Mixin for an adapted nn.Linear; its class keeps the name, the keys and the attributes of the original."""

    lora_A: Any  # nn.ModuleDict of LoRAFactor; nn.Module's own annotations would call it a Tensor
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any

    def forward(self, input: Tensor) -> Tensor:
        base = self.base_forward(input)
        name = self.__dict__[ACTIVE]
        if name is None:
            return base
        A, B, dropout, magnitude = self.lora_A[name], self.lora_B[name], None, None
        lora = A.spec.lora
        if lora.dropout:
            dropout = self.lora_dropout[name]
        if lora.dora:
            magnitude = functools.partial(
                self.lora_magnitude_vector[name],
                weight=self._parameters["weight"],
                bias=self.bias,
                lora_A=A.weight,
                lora_B=B.weight,
            )
        return add_low_rank(base, input, A, B, dropout, magnitude, lora.scaling, A.spec.mixed)

    def base_forward(self, input: Tensor) -> Tensor:
        """Return what the module computes without its adapter."""
        return super().forward(input)


class AdaptedWeightRead(AdaptedLinear):
    """Mixin for an adapted nn.Linear whose `weight` somebody reads instead of calling it.

    torch's fused path of nn.TransformerEncoderLayer hands `linear1.weight` to a kernel; so `weight` is the effective
    weight W + scaling · B A here, and the base weight stays the parameter of that name.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        base = self.base_weight
        return base if self.__dict__[ACTIVE] is None else effective_weight(self, base)

    @property
    def base_weight(self) -> Tensor:
        """The base weight W itself (`attach.BASE_WEIGHT`)."""
        base = self._parameters["weight"]
        assert base is not None
        return base

    def base_forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.base_weight, self.bias)


def effective_weight(owner: nn.Module, base: Tensor) -> Tensor:
    """Return W + scaling · B A (DoRA: m · V / ‖V‖) in W's dtype, through which gradients reach the adapter."""
    found = attached(owner)
    assert found is not None
    A, B, scaling = found.lora_A.weight, found.lora_B.weight, found.spec.scaling
    delta = low_rank_weight(A, B, scaling).to(base.dtype)
    if found.magnitude is None:
        return base + delta
    scale = (found.magnitude.weight / row_norms(base, A, B, scaling).to(base.dtype)).unsqueeze(1)
    return base + (scale - 1) * base + scale * delta


def adapt(owner: nn.Module, shape: tuple[int, ...], spec: AdapterSpec, weight_is_read: bool) -> None:
    """Attach an adapter to the module and let its forward use it, in place."""
    weight = owner.weight
    assert isinstance(weight, Tensor)
    attach(owner, weight, shape, spec)
    swap(owner, AdaptedWeightRead if weight_is_read else AdaptedLinear)
    owner.__dict__[ACTIVE] = spec.adapter


def set_active(owner: nn.Module, adapter: str | None) -> str | None:
    """Switch the module to the adapter of that name, or off with None; return what was active."""
    before: str | None = owner.__dict__[ACTIVE]
    owner.__dict__[ACTIVE] = adapter
    return before


_READ = {nn.TransformerEncoderLayer: ("linear1", "linear2"), nn.MultiheadAttention: ("out_proj",)}
"""Children of torch's own classes whose weight is handed to a kernel, at least in eval mode."""


def weights_read(model: nn.Module) -> set[str]:
    """Return the paths of linears whose weight torch's own layers read instead of calling the linear."""
    return {
        dotted(path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for kind, names in _READ.items()
        if issubclass(original_class(module), kind)
        for name in names
    }
