"""What is decided for every site of a model.  Pure data; no torch here."""

from dataclasses import dataclass, field, fields
from typing import Any, Self

from lora_fx.planning.planned import PlannedSite, TrainedModule, TrainedRows, dead_notes, rank_notes


@dataclass(frozen=True, slots=True)
class Decisions:
    """What rules, or the files of an adapter, want of every site of a model; how it is computed is still open."""

    model: str
    """The model's class name."""
    source: str
    """Where it comes from: the rule file, or the directory of the adapter."""
    sites: tuple[PlannedSite, ...]
    train: tuple[TrainedModule, ...]
    total: int
    """Number of parameters of the model as given."""
    fingerprint: str
    notes: tuple[str, ...] = ()
    unmatched_rules: tuple[str, ...] = ()
    """Rules with `expect: any` (or 0) that decide no site here."""
    rules: dict[str, object] = field(default_factory=dict, compare=False)
    tokens: tuple[TrainedRows, ...] = ()
    biases: tuple[TrainedModule, ...] = ()
    """Biases that are trained beside those of adapted sites, each by its own name."""

    @property
    def adapted(self) -> tuple[PlannedSite, ...]:
        return tuple([site for site in self.sites if site.decision == "adapt"])

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters of the sites, in the order of these."""
        return tuple(dict.fromkeys([site.lora.adapter for site in self.adapted if site.lora is not None]))

    @property
    def refused(self) -> tuple[PlannedSite, ...]:
        return tuple([site for site in self.sites if site.decision == "refuse"])

    @property
    def cautions(self) -> tuple[str, ...]:
        """What `apply` warns of, each also a note: ranks that save nothing, sites that are never used."""
        return (*rank_notes(self.sites), *dead_notes(self.sites))

    @property
    def beside(self) -> dict[str, int]:
        """Number of parameters of all that is trained beside A and B, by what a plan calls it."""
        modules = {f"train: {module.path}": module.parameters for module in self.train}
        rows = {f"tokens: {rows.weight} of {rows.adapter}": rows.parameters for rows in self.tokens}
        return modules | rows | {f"bias: {bias.path}": bias.parameters for bias in self.biases}

    @property
    def trainable(self) -> int:
        """Number of parameters that will be trained: adapters, modules under `train:`, rows, biases."""
        return sum(site.trainable for site in self.sites) + sum(self.beside.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the plan itself: it never changes, and every copy of an adapted block would copy it all."""
        return self

    def decided(self) -> dict[str, Any]:
        """Return the fields of the decisions; of a plan, without what a study has added."""
        return {part.name: getattr(self, part.name) for part in fields(Decisions)}
