"""What an adapter has become, site by site, as data: norms and singular values of ΔW.  Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lora_fx.text import columns, count


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


def deltas_text(model: str, rows: Sequence[DeltaRow]) -> str:
    """Return a table with a line for each adapter."""
    head = ("site", "r", "used", "‖ΔW‖", "‖ΔW‖/‖W‖", "largest σ", "smallest σ")
    return f"{model} · {count(len(rows), 'adapter')}\n\n{columns([head, *map(_cells, rows)])}"


def _cells(row: DeltaRow) -> tuple[str, ...]:
    path = row.path if row.call is None else f"{row.path} call {row.call}"
    values = row.singular_values or (0.0,)
    return (path, str(row.r), f"{row.effective_rank:.1f}", f"{row.norm:.3g}", ratio_text(row),
            f"{values[0]:.3g}", f"{values[-1]:.3g}")  # fmt: skip


def ratio_text(row: DeltaRow) -> str:
    """Return ‖ΔW‖ / ‖W‖ in per cent; empty where W is not known."""
    return "" if row.ratio is None else f"{100 * row.ratio:.2g} %"


def deltas_json(model: str, rows: Sequence[DeltaRow]) -> str:
    """Return all facts of the adapters as JSON."""
    sites = [asdict(row) | {"ratio": row.ratio, "effective_rank": row.effective_rank} for row in rows]
    return json.dumps({"schema_version": 1, "model": model, "sites": sites}, indent=1)
