"""What can be adapted, as data: a site is a weight that multiplies an activation.  No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Backend = Literal["graph", "module"]


@dataclass(frozen=True, slots=True)
class Site:
    """One weight that multiplies an activation, whatever wrote it."""

    path: str
    """Dotted path of the owning module, under the first of its names."""
    op: str
    """What is done with the weight: one of `rules.OPS`."""
    classes: tuple[str, ...]
    """The owner's class as a rule may write it: `Linear` and `torch.nn.modules.linear.Linear`."""
    shape: tuple[int, ...]
    """(out_features, in_features), as `nn.Linear.weight`."""
    dtype: str = "float32"
    bias: bool = False
    """Whether a bias belongs to it."""
    calls: int | None = None
    """How often one forward uses it; None where no inputs were given."""
    aliases: tuple[str, ...] = ()
    """Other names of the same module."""
    tied_to: tuple[str, ...] = ()
    """Names of other parameters that are the same weight."""
    refusal: str | None = None
    """Why it cannot be adapted; None if it can."""
    backend: Backend = "module"
    backend_reason: str = ""
    """Why this backend, when it is not the graph."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    def text(self) -> str:
        """Return `Linear 768 → 3072`."""
        return f"{self.classes[0]} {' × '.join(map(str, self.shape[1:]))} → {self.shape[0]}"


def fingerprint(sites: Iterable[Site]) -> str:
    """Return a hash over what a plan relies on (paths, operations, shapes), not over values or dtypes."""
    digest = hashlib.sha256()
    for site in sites:
        digest.update(f"{site.path}\0{site.op}\0{site.shape}\n".encode())
    return digest.hexdigest()[:16]


def differences(planned: Iterable[Site], found: Iterable[Site]) -> list[tuple[str, str, str]]:
    """Return (path, planned, found) for every site in which the two differ."""
    before = {site.path: _identity(site) for site in planned}
    after = {site.path: _identity(site) for site in found}
    paths = [*before, *(path for path in after if path not in before)]
    return [
        (path, before.get(path, "nothing"), after.get(path, "nothing"))
        for path in paths
        if before.get(path) != after.get(path)
    ]


def _identity(site: Site) -> str:
    return site.text() if site.classes[0].lower() == site.op else f"{site.text()} ({site.op})"
