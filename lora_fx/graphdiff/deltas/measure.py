"""Norms and singular values of every adapter's ΔW = scaling · B A, without ever forming B A.

With the thin decompositions B = Q₁ R₁ and Aᵀ = Q₂ R₂, B A = Q₁ (R₁ R₂ᵀ) Q₂ᵀ, so the singular values of B A are those of
the r × r matrix R₁ R₂ᵀ (Golub and Van Loan, Matrix Computations, 4th ed., §5.2 and §8.6).
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.errors import RefusedError
from lora_fx.graphdiff.deltas.heatmaps import deltas_html, deltas_svg
from lora_fx.graphdiff.deltas.spectra import DeltaRow, ratio_text
from lora_fx.models.shards import is_sharded, whole
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import columns, count, json_text
from lora_fx.tuned.build import record_in


@dataclass(frozen=True, slots=True, repr=False)
class Deltas(InNotebook):
    """What `lora_fx.deltas` returns."""

    model: str
    sites: tuple[DeltaRow, ...]

    def __str__(self) -> str:
        head = ("site", "r", "used", "‖ΔW‖", "‖ΔW‖/‖W‖", "largest σ", "smallest σ")
        return f"{self.model} · {count(len(self.sites), 'adapter')}\n\n{columns([head, *map(_cells, self.sites)])}"

    def to_json(self) -> str:
        """Return all facts of the adapters as JSON."""
        sites = [asdict(row) | {"ratio": row.ratio, "effective_rank": row.effective_rank} for row in self.sites]
        return json_text({"schema_version": 1, "model": self.model, "sites": sites}, indent=1)

    def to_svg(self) -> str:
        """Return heatmaps of rank, of ‖ΔW‖ / ‖W‖ and of the effective rank, by layer and site."""
        return deltas_svg(self.model, self.sites)

    def to_html(self) -> str:
        """Return one page that needs nothing else: heatmaps and the singular values of every site."""
        return deltas_html(self.model, self.sites)


def _cells(row: DeltaRow) -> tuple[str, ...]:
    values = row.singular_values or (0.0,)
    return (row.name, str(row.r), f"{row.effective_rank:.1f}", f"{row.norm:.3g}", ratio_text(row),
            f"{values[0]:.3g}", f"{values[-1]:.3g}")  # fmt: skip


def deltas_of(tuned: nn.Module) -> Deltas:
    """Return what the adapters of a model have become; the model stays unchanged.

    Raises:
        RefusedError: the model is not adapted, or has no values.
    """
    record = record_in(tuned)
    with torch.no_grad():
        found = list(all_attached(tuned))
        several = len({adapter.spec.adapter for _, adapter in found}) > 1
        return Deltas(record.plan.model, tuple(_row(path, adapter, several) for path, adapter in found))


def _row(path: str, adapter: Attached, several: bool) -> DeltaRow:
    if adapter.lora_A.weight.is_meta:
        raise RefusedError("the adapters have no values", [(path, "its adapter is on the meta device")])
    if adapter.lora_A.weight.numel() == 0:
        advice = "gather them (deepspeed.zero.GatheredParameters)"
        raise RefusedError(
            "this process holds no values of the adapters", [(path, "ZeRO-3 has partitioned it")], advice
        )
    B, A = adapter.lora_B.matrix, adapter.lora_A.matrix
    row = delta_row(path, adapter.spec.rule, adapter.spec.lora.r, adapter.spec.scaling, B, A, adapter.call)
    name = adapter.spec.adapter if several else ""
    return replace(row, weight_norm=_norm(adapter.base_weight), adapter=name)


def delta_row(path: str, rule: str, r: int, scaling: float, B: Tensor, A: Tensor, call: int | None = None) -> DeltaRow:
    """Return what is known of ΔW = scaling · B A without its base weight.

    Args:
        path: of the site, as are `rule` and `call`.
        rule: that has adapted it.
        r: rank.
        scaling: of the product.
        B: [.., out, ranks]: one matrix, or a bank of them.
        A: [.., ranks, in].
        call: the call that it serves, where each has its own.
    """
    values = singular_values(B, A) * abs(scaling)
    return DeltaRow(
        path=path,
        rule=rule,
        r=r,
        scaling=scaling,
        shape=(*B.shape[:-1], A.shape[-1]),
        norm=float(values.norm()),
        weight_norm=None,
        singular_values=tuple((values.mean(0) if values.dim() > 1 else values).tolist()),
        call=call,
    )


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the singular values of B A, the largest first, in float64.

    Args:
        B: [.., out, r]: one matrix, or a bank of them.
        A: [.., r, in].

    Returns:
        [.., r].
    """
    left = torch.linalg.qr(B.double(), mode="r").R
    right = torch.linalg.qr(A.double().transpose(-1, -2), mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.transpose(-1, -2))
    return values


def _norm(weight: Tensor) -> float | None:
    """Return the Frobenius norm of a weight; None for one that is quantised or has no values."""
    known = type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)
    if not known or not weight.is_floating_point() or weight.is_meta:
        return None
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return float(whole(torch.linalg.vector_norm(weight, dtype=dtype)))
