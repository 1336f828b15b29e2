"""What an adapter knows of itself, as data that travels with its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_fx.planning.sites import Layout
from lora_fx.rules.ruleset import LoRAConfig

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
    shape: tuple[int, ...] = ()
    """Of the site: (out, in), (out, in / groups, kernel…), or (bank, out, in)."""
    parameter: str = "weight"
    """Name of the base weight in the module that owns it."""
    layout: Layout = "out_in"
    parts: tuple[tuple[int, ...], ...] = ()
    """Rows of each adapted part; empty if the whole weight is adapted."""
    slices: dict[str, object] | None = None
    """The slices as a rule file would hold them."""
    calls: int = 0
    """Number of calls that have an adapter each; 0 if one adapter serves all calls."""

    @property
    def scaling(self) -> float:
        return self.lora.scaling

    @property
    def path_is_owner(self) -> bool:
        """Whether the site is known by the path of the module that owns the weight, not by that of the weight."""
        return self.parameter == "weight" and not self.path.endswith(".weight") and self.path != "weight"

    @property
    def rank(self) -> int:
        """Inner dimension of B A: r for each part."""
        return self.lora.r * max(1, len(self.parts))

    @property
    def matrices(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """((bank,) or (), (out, in)) of the matrices that the weight is made of."""
        inner = self.shape[1 + self.is_banked :]
        return self.shape[: int(self.is_banked)], (self.shape[int(self.is_banked)], math.prod(inner))

    @property
    def is_banked(self) -> bool:
        """Whether the weight holds several matrices."""
        return self.op not in ("conv1d", "conv2d", "conv3d") and len(self.shape) == 3
