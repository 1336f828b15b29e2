"""What an adapter has become, site by site, as data: norms and singular values of ΔW.  Needs no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeltaRow:
    """ΔW = scaling · B A of one adapter."""

    path: str
    rule: str
    r: int
    scaling: float
    shape: tuple[int, ...]
    """(out, in) of the weight, the number of matrices before it for a bank."""
    norm: float
    """‖ΔW‖, Frobenius; of DoRA without its magnitude."""
    weight_norm: float | None
    """‖W‖ of the base weight; None where it is quantised."""
    singular_values: tuple[float, ...]
    """Of ΔW, the largest first; for a bank of matrices the mean over its members."""
    call: int | None = None
    """Number of the call that it serves, where every call of the site has an adapter of its own."""
    adapter: str = ""
    """Its name, where the model has several."""

    @property
    def name(self) -> str:
        """The path, with the number of the call if it serves one, and the adapter's name if there are several."""
        called = self.path if self.call is None else f"{self.path} call {self.call}"
        return f"{called} ({self.adapter})" if self.adapter else called

    @property
    def ratio(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def effective_rank(self) -> float:
        """How many directions ΔW really uses: exp(-Σ p ln p) with p = σ / Σ σ; 0 for ΔW = 0.

        Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO, §2.
        """
        total = sum(self.singular_values)
        if not total:
            return 0.0
        shares = (value / total for value in self.singular_values if value > 0)
        return math.exp(-sum(share * math.log(share) for share in shares))


def ratio_text(row: DeltaRow) -> str:
    """Return ‖ΔW‖ / ‖W‖ in per cent; empty where W is not known."""
    return "" if row.ratio is None else f"{100 * row.ratio:.2g} %"
