"""Rules whose ranks were spread over the sites of a model under a budget, and a table that explains each rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_fx.rules.ruleset import RuleSet
from lora_fx.rules.writing import rule_file
from lora_fx.text import columns, percent, thousands


@dataclass(frozen=True, slots=True)
class AllocatedSite:
    """A site with the rank that it has got, and why."""

    path: str
    weight: str
    """Class and sizes of its weight: `Linear 768 → 3072`."""
    before: int
    """The rank that its rule said."""
    r: int
    parameters: int
    """Of its factors A and B."""
    gains: tuple[float, ...]
    """What each direction of its weight (or gradient) has of the whole: σ² / Σ σ², the largest first."""
    size: float
    """What they count together: by gradient its square norm ‖G‖², by spectrum 1 for each matrix of the weight."""
    limit: str = ""
    """What kept the rank from being higher or lower: `at most 16`, `at least 1`."""

    @property
    def held(self) -> float:
        """Which share of ‖W‖² (by gradient ‖G‖²) lies in the first r directions."""
        return sum(self.gains[: self.r])


@dataclass(frozen=True, slots=True)
class Allocation(RuleSet):
    """Rules with ranks under a budget: `plan` and `apply` take it as it is, `to_yaml` writes it.

    Printed, it is a table with the rank of every site and its reason.
    """

    sites: tuple[AllocatedSite, ...] = ()
    """In model order."""
    by: str = "spectrum"
    """"spectrum" of the weights, or "gradient" of the loss on data."""
    budget: int = 0
    """Parameters, or with `mean_r` the sum of ranks, that were not to be exceeded."""
    mean_r: float | None = None
    """The mean rank that was asked for; None where parameters were."""

    @property
    def parameters(self) -> int:
        """Number of parameters of all factors A and B."""
        return sum(site.parameters for site in self.sites)

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return a line for each site: its weight, rank before and now, parameters, and why."""
        return "\n".join([*self._head(), "", columns([_HEADS, *map(self._row, self.sites)])])

    def to_yaml(self) -> str:
        """Return the text of a rule file that is read as the same rules; the table stands in it as remarks."""
        return rule_file(self.short_dict(), self.table())

    def _head(self) -> Sequence[str]:
        ranks = [site.r for site in self.sites]
        mean, before = sum(ranks) / len(ranks), sum(site.before for site in self.sites) / len(ranks)
        asked = f"mean rank {self.mean_r:g}" if self.mean_r is not None else f"{thousands(self.budget)} parameters"
        what = "the spectrum of each weight" if self.by == "spectrum" else "the gradient of the loss"
        cost = "" if self.mean_r is not None else " for each parameter"
        return (
            f"{self.source} · ranks by {what}, at most {asked}",
            f"{thousands(self.parameters)} parameters, mean rank {mean:.3g} (before: {before:.3g}), "
            f"{min(ranks)} to {max(ranks)}; each next rank goes where it gains most{cost}",
        )

    def _row(self, site: AllocatedSite) -> tuple[str, ...]:
        total = sum(other.size for other in self.sites)
        share = f"{_share(site.size, total)} of all ‖G‖², " if self.by == "gradient" else ""
        norm = "‖W‖²" if self.by == "spectrum" else "its own"
        first = "none" if not site.r else "the first" if site.r == 1 else f"the first {site.r}"
        held = f"{share}{first} of its directions {'has' if site.r == 1 else 'have'} {_share(site.held, 1.0)} of {norm}"
        why = ", ".join(filter(None, (held, site.limit)))
        return site.path, site.weight, str(site.before), str(site.r), thousands(site.parameters), why


_HEADS = ("site", "weight", "before", "r", "parameters", "why")


def _share(part: float, whole: float) -> str:
    return percent(round(part / whole * 10**6) if whole else 0, 10**6)
