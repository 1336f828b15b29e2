"""What stands out in an adapter: where its energy is, in how few directions, and which sites differ from their kind.

Facts to look at, not a verdict: an adapter can do harm with none of them, and none with all.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from lora_fx.graphdiff.deltas.spectra import DeltaRow
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.planning.rows import NUMBER
from lora_fx.text import columns, count, json_text

_FEWEST = 4
"""How many sites of a kind are needed to say what is usual for it."""
_FAR = 3.5
"""Beyond this |z| a site stands out (Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers, §3.4)."""
_NO_VERDICT = "Facts, not a verdict: an adapter can do harm with none of these, and none with all."
_NARROWEST = 0.01
"""The least MAD: sites that agree within 1 % do not make another one stand out that is 4 % off."""
_LEAST = 1e-9
"""‖ΔW‖ below this part of the largest counts as this part: what was hardly trained has no smaller logarithm."""


@dataclass(frozen=True, slots=True)
class AuditedSite:
    """ΔW = scaling · B A of one site, beside those of the others."""

    path: str
    r: int
    effective_rank: float
    norm: float
    """‖ΔW‖, Frobenius."""
    energy: float
    """‖ΔW‖² / Σ ‖ΔW‖² over all sites, 0 to 1; 0 where all are 0."""
    first: float
    """σ₁² / Σ σ², 0 to 1: the share of the site's energy in its strongest direction."""
    times_usual: float | None
    """‖ΔW‖ / median ‖ΔW‖ of the sites whose path differs in numbers only; None where there are fewer than four."""
    z: float | None
    """0.6745 (x - median) / MAD of x = log ‖ΔW‖ among these."""

    @property
    def stands_out(self) -> bool:
        """Whether |z| > 3.5."""
        return self.z is not None and abs(self.z) > _FAR


@dataclass(frozen=True, slots=True, repr=False)
class Audit(InNotebook):
    """What `lora_fx.audit` returns; the sites with the most energy come first."""

    adapter: str
    sites: tuple[AuditedSite, ...]
    whole: int
    """Number of parameters of modules that are trained whole, about which nothing is said here."""

    def __str__(self) -> str:
        return self.text()

    def text(self, most: int = 20) -> str:
        """Return the sums, the sites with the most energy, and those that stand out."""
        chosen = [site for number, site in enumerate(self.sites) if number < most or site.stands_out]
        head = ("site", "r", "used", "‖ΔW‖", "energy", "first σ", "× usual", "")
        lines = [self._sums(), "", columns([head, *map(_cells, chosen)])]
        if len(chosen) < len(self.sites):
            lines.append(f"  … {count(len(self.sites) - len(chosen), 'site')} more with less energy")
        if self.whole:
            lines.append(f"  not judged: {count(self.whole, 'parameter')} of modules trained whole")
        return "\n".join([*lines, "", _NO_VERDICT])

    def _sums(self) -> str:
        norm = math.sqrt(sum(site.norm**2 for site in self.sites))
        far = sum(site.stands_out for site in self.sites)
        return (
            f"{self.adapter} · {count(len(self.sites), 'site')} · ‖ΔW‖ {norm:.3g} in all · half of the energy in "
            f"{count(self.sites_with(0.5), 'site')} · {far} standing out"
        )

    def sites_with(self, share: float) -> int:
        """Return how few sites have this share of the energy together; 0 where there is none."""
        total, number = 0.0, 0
        if not any(site.energy for site in self.sites):
            return 0
        while total < share * (1 - 1e-12) and number < len(self.sites):
            total, number = total + self.sites[number].energy, number + 1
        return number

    def to_json(self) -> str:
        """Return all facts as JSON."""
        sites = [asdict(site) | {"stands_out": site.stands_out} for site in self.sites]
        return json_text({"schema_version": 1, "adapter": self.adapter, "whole": self.whole, "sites": sites}, indent=1)


def _cells(site: AuditedSite) -> tuple[str, ...]:
    usual = "" if site.times_usual is None else f"{site.times_usual:.3g}"
    far = f"stands out, z = {site.z:.2g}" if site.stands_out else ""
    return (site.path, str(site.r), f"{site.effective_rank:.1f}", f"{site.norm:.3g}", f"{100 * site.energy:.2g} %",
            f"{100 * site.first:.2g} %", usual, far)  # fmt: skip


def audit_of(adapter: str, rows: Sequence[DeltaRow], whole: int = 0) -> Audit:
    """Return the audit of an adapter's sites.

    Args:
        adapter: what it is called.
        rows: of all sites.
        whole: number of parameters of modules that are trained whole.
    """
    total = sum(row.norm**2 for row in rows)
    kinds: dict[tuple[str, int | None, str], list[float]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row.norm)
    least = _LEAST * max((row.norm for row in rows), default=0.0)
    sites = [_audited(row, total, kinds[_kind(row)], least) for row in rows]
    return Audit(adapter, tuple(sorted(sites, key=lambda site: -site.energy)), whole)


def _kind(row: DeltaRow) -> tuple[str, int | None, str]:
    return NUMBER.sub("#", row.path), row.call, row.adapter


def _audited(row: DeltaRow, total: float, norms: Sequence[float], least: float) -> AuditedSite:
    squares = [value**2 for value in row.singular_values]
    times, z = None, None
    if len(norms) >= _FEWEST and least:
        logs = [math.log(max(norm, least)) for norm in norms]
        own, middle = math.log(max(row.norm, least)), median(logs)
        spread = max(median(abs(value - middle) for value in logs), _NARROWEST)
        times = math.exp(own - middle)
        z = 0.6745 * (own - middle) / spread
    return AuditedSite(
        path=row.name,
        r=row.r,
        effective_rank=row.effective_rank,
        norm=row.norm,
        energy=row.norm**2 / total if total else 0.0,
        first=max(squares, default=0.0) / sum(squares) if sum(squares) else 0.0,
        times_usual=times,
        z=z,
    )
