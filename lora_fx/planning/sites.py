"""What can be adapted, as data: a site is a weight that multiplies an activation.  No torch here."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

from lora_fx.rules.ruleset import Match
from lora_fx.text import shortened

Backend = Literal["graph", "module"]
Layout = Literal["out_in", "in_out"]
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, slots=True)
class Site:
    """One weight that multiplies an activation, whatever wrote it."""

    path: str
    """Dotted path of the owning module, under the first of its names; of a raw parameter, its own dotted name."""
    op: str
    """What is done with the weight: one of `rules.OPS`."""
    classes: tuple[str, ...]
    """The owner's class as a rule may write it: `Linear` and `torch.nn.modules.linear.Linear`."""
    shape: tuple[int, ...]
    """(out, in); of a convolution (out, in / groups, kernel…); of a bank of experts (bank, out, in)."""
    dtype: str = "float32"
    bias: bool = False
    """Whether a bias belongs to it."""
    calls: int | None = None
    """How often one forward uses it; None where no inputs were given."""
    aliases: tuple[str, ...] = ()
    """Other names of the same site."""
    tied_to: tuple[str, ...] = ()
    """Names of other parameters that are the same weight."""
    refusal: str | None = None
    """Why it cannot be adapted; None if it can."""
    parameter: str = ""
    """Dotted name of the weight where it is a raw parameter; empty where it is `weight` of the module at `path`."""
    layout: Layout = "out_in"
    """How the parameter holds the matrix: as [out, in], or transposed."""
    read: bool = False
    """Whether code reads the weight, instead of (or besides) calling the module that owns it."""
    outside: bool = False
    """Whether some of that code is another module's than the owner's."""

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # it never changes

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    @property
    def weight(self) -> str:
        """Dotted name of the weight."""
        return self.parameter or f"{self.path}.weight".lstrip(".")

    @property
    def owner(self) -> str:
        """Dotted path of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def is_banked(self) -> bool:
        """Whether the weight holds several matrices, [bank, out, in]."""
        return len(self.shape) == 3 and self.op not in CONVOLUTIONS

    @property
    def bank(self) -> int:
        """Number of matrices that the weight holds."""
        return self.shape[0] if self.is_banked else 1

    @property
    def features(self) -> tuple[int, int]:
        """(out, in) of the matrix; a convolution's kernel counts as inputs."""
        shape = self.shape[1:] if self.is_banked else self.shape
        return shape[0], math.prod(shape[1:])

    def fits(self, match: Match) -> bool:
        """Whether a rule matches the site."""
        return match.fits(self.paths, self.shape, self.op, self.classes)

    def mismatch(self, match: Match) -> str | None:
        """Return why a rule does not match the site; None if it does."""
        return match.explain(self.paths, self.shape, self.op, self.classes)

    def text(self) -> str:
        """Return `Linear 768 → 3072`; of a bank, `Experts 8 × 768 → 3072`."""
        return weight_text(self.classes[0], [*map(str, self.shape)], self.is_banked)


def weight_text(kind: str, sizes: Sequence[str], is_banked: bool) -> str:
    """Return the class and the sizes of a weight, [.., out, in]: `Linear 768 → 3072`, `Experts 8 × 768 → 3072`."""
    *bank, out_features = sizes[: 1 + is_banked]
    return f"{kind} {' × '.join((*bank, *sizes[1 + is_banked :]))} → {out_features}"


_RELIED_ON = tuple(fact.name for fact in fields(Site) if fact.name not in ("path", "dtype"))


def differences(planned: Iterable[Site], present: Iterable[Site]) -> list[tuple[str, str, str]]:
    """Return (path, planned, present) for every site in which the two differ; dtypes do not count.

    Where name, operation and shape are the same, the facts that differ are named.
    """
    before, after = ({site.path: site for site in sites} for sites in (planned, present))
    differences = []
    for path in before | after:
        old, new = before.get(path), after.get(path)
        if old is None or new is None or _identity(old) != _identity(new):
            differences.append(
                (path, "nothing" if old is None else _identity(old), "nothing" if new is None else _identity(new))
            )
        elif other := [name for name in _RELIED_ON if getattr(old, name) != getattr(new, name)]:
            facts = (", ".join(f"{name} {getattr(site, name)!r}" for name in other) for site in (old, new))
            differences.append((path, *map(shortened, facts)))  # type: ignore[arg-type]
    return differences


def _identity(site: Site) -> str:
    return site.text() if site.classes[0].lower() == site.op else f"{site.text()} ({site.op})"
