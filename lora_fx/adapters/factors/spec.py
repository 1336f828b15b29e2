"""What an adapter knows of itself, as data that travels with its parameters."""

from dataclasses import dataclass, field

from torch import Tensor

from lora_fx.adapters.selection import Switch
from lora_fx.planning.plan import Plan
from lora_fx.planning.sites import Site
from lora_fx.rules.inits import pairs_of
from lora_fx.rules.ruleset import LoRAConfig, Slices


@dataclass(slots=True)
class ModelRecord:
    """What is known of an adapted model as a whole; one object, shared by all its adapters.

    It hangs on the adapters and not on the model, so that it survives deepcopy and pickle of a GraphModule too.
    """

    plan: Plan
    """By which the model was adapted, without captured graphs."""
    requires_grad: frozenset[str]
    """Names of the base parameters that required a gradient in the caller's model."""
    switch: Switch
    """What the model uses of its adapters."""
    added: dict[str, Plan] = field(default_factory=dict)
    """By which adapters were added to it later, by their name."""
    base: dict[str, Tensor] = field(default_factory=dict)
    """Values of the caller's model for what the adapted model has of its own: trained parameters and buffers."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Paths of the modules that are trained whole."""
        return tuple(module.path for module in self.plan.train)


@dataclass(slots=True)
class AdapterSpec:
    """One adapter at one site."""

    site: Site
    lora: LoRAConfig
    rule: str
    mixed: bool
    """Whether the adapter's dtype differs from the base weight's."""
    record: ModelRecord
    slices: Slices | None = None
    """The parts of the weight that are adapted; None for the whole."""
    calls: int = 0
    """Number of calls that have an adapter each; 0 if one adapter serves all calls."""
    parts: tuple[tuple[int, ...], ...] = field(init=False)
    """Rows of each adapted part; empty if the whole weight is adapted."""
    parameter: str = field(init=False)
    """Name of the base weight in the module that owns it."""

    def __post_init__(self) -> None:
        self.parameter = self.site.parameter.rpartition(".")[2] or "weight"
        self.parts = () if self.slices is None else self.slices.rows(self.site.features[0])

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def adapter(self) -> str:
        return self.lora.adapter

    @property
    def scaling(self) -> float:
        return self.lora.scaling

    @property
    def path_is_owner(self) -> bool:
        """Whether the site is known by the path of the module that owns the weight, not by that of the weight."""
        return not self.site.parameter

    @property
    def rank(self) -> int:
        """Inner dimension of the product: r for each part; 2r where B₀ A₀ is taken away from B A (see `moved`)."""
        return self.lora.r * max(1, len(self.parts)) * pairs_of(self.lora.init)
