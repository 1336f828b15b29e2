"""What an adapter knows of itself, as data that travels with its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_fx.rules import LoRAConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class ModelRecord:
    """What is known of an adapted model as a whole; one object, shared by all its adapters.

    It hangs on the adapters and not on the model, so that it survives deepcopy and pickle of a GraphModule too.
    """

    model: str
    """Class name of the model."""
    rules: dict[str, object]
    """The rules, as `RuleSet.to_dict` gives them."""
    plan: str
    """The plan, as JSON."""
    requires_grad: frozenset[str]
    """Names of the base parameters that required a gradient in the caller's model."""
    base: dict[str, Tensor] = field(default_factory=dict)
    """Values of the caller's model for what the adapted model has of its own: trained parameters and buffers."""
    trained: tuple[str, ...] = ()
    """Paths of the modules that are trained whole."""


@dataclass(slots=True)
class AdapterSpec:
    """One adapter at one site."""

    path: str
    op: str
    adapter: str
    rule: str
    lora: LoRAConfig
    mixed: bool
    """Whether the adapter's dtype differs from the base weight's."""
    record: ModelRecord

    @property
    def scaling(self) -> float:
        return self.lora.scaling
