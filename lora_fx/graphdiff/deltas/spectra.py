"""What an adapter has become, site by site, as data: norms and singular values of ΔW.  Needs no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from lora_fx.text import columns, count


@dataclass(frozen=True, slots=True)
class Delta:
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
    """The call that it serves, where each has an adapter of its own."""

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


@dataclass(frozen=True, slots=True)
class Deltas:
    """What `lora_fx.deltas` returns."""

    model: str
    sites: tuple[Delta, ...]

    def __str__(self) -> str:
        head = ("site", "r", "used", "‖ΔW‖", "‖ΔW‖/‖W‖", "largest σ", "smallest σ")
        rows = [head, *(_row(each) for each in self.sites)]
        return f"{self.model} · {count(len(self.sites), 'adapter')}\n\n{columns(rows)}"

    def to_json(self) -> str:
        sites = [asdict(each) | {"ratio": each.ratio, "effective_rank": each.effective_rank} for each in self.sites]
        return json.dumps({"schema_version": 1, "model": self.model, "sites": sites}, indent=1)

    def to_svg(self) -> str:
        """Return heatmaps of rank, of ‖ΔW‖ / ‖W‖ and of the effective rank, by layer and site."""
        from lora_fx.graphdiff.deltas.heatmaps import deltas_svg

        return deltas_svg(self)

    def to_html(self) -> str:
        """Return one page that needs nothing else: heatmaps and the singular values of every site."""
        from lora_fx.graphdiff.deltas.heatmaps import deltas_html

        return deltas_html(self)


def _row(each: Delta) -> tuple[str, ...]:
    path = each.path if each.call is None else f"{each.path} call {each.call}"
    values = each.singular_values or (0.0,)
    return (path, str(each.r), f"{each.effective_rank:.1f}", f"{each.norm:.3g}", ratio_text(each),
            f"{values[0]:.3g}", f"{values[-1]:.3g}")  # fmt: skip


def ratio_text(each: Delta) -> str:
    """Return ‖ΔW‖ / ‖W‖ in per cent."""
    return "" if each.ratio is None else f"{100 * each.ratio:.2g} %"
