"""A training run as data: its sites, its steps, and what can be said of them.  Needs no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RecordedSite:
    """An adapter whose norm is recorded."""

    path: str
    rule: str
    r: int
    scaling: float
    layer: str
    """Path up to the number that counts layers; the whole path where there is none."""
    call: int | None = None
    """Number of the call that it serves, where every call of the site has an adapter of its own."""
    adapter: str = ""
    """Its name, where the model has several."""

    @property
    def name(self) -> str:
        """The path, with the number of the call if it serves one, and the adapter's name if there are several."""
        called = self.path if self.call is None else f"{self.path} call {self.call}"
        return f"{called} ({self.adapter})" if self.adapter else called


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One line of a record."""

    step: int
    """Number of optimizer steps so far."""
    loss: float | None
    """Mean over the last `mean_of` steps; NaN or infinite as it was; None where no loss was given."""
    mean_of: int
    norms: Sequence[float]
    """‖ΔW‖, Frobenius, of each site in the order of `sites`."""


@dataclass(frozen=True, slots=True)
class History:
    """What a record's file holds."""

    model: str
    lora_fx: str
    """Version that began the file."""
    sites: tuple[RecordedSite, ...] = field(repr=False)
    steps: tuple[RecordedStep, ...] = field(repr=False)
    """In rising order.  Where a run went back to a checkpoint, what it did after is in place of what was before."""
    replaced: int = 0
    """Number of lines of steps that were made again after a run went back."""
    cut: bool = False
    """Whether the end of the file is half a line, as a crash leaves it."""
    layers: tuple[str, ...] = field(init=False)
    """Every layer once, in the order of the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(dict.fromkeys(site.layer for site in self.sites)))

    def losses(self) -> list[tuple[int, float]]:
        """Return (step, loss) of every line that has one, NaN and infinite ones too."""
        return [(line.step, line.loss) for line in self.steps if line.loss is not None]

    def layer_norms(self, line: RecordedStep) -> list[float]:
        """Return ‖ΔW‖ of each layer at a line: the root of the sum of squares over its sites."""
        sums = dict.fromkeys(self.layers, 0.0)
        for site, norm in zip(self.sites, line.norms, strict=True):
            sums[site.layer] += norm * norm
        return [math.sqrt(total) if total >= 0 else math.nan for total in sums.values()]

    def untrained(self) -> list[RecordedSite]:
        """Return the sites whose ΔW is 0 at the last line."""
        last = self.steps[-1].norms if self.steps else ()
        return [site for site, norm in zip(self.sites, last, strict=False) if norm == 0]

    def warnings(self) -> Iterator[str]:
        """Yield what is wrong with the run: losses and norms that are not finite."""
        line = next((line for line in self.steps if line.loss is not None and not math.isfinite(line.loss)), None)
        if line is not None and line.loss is not None:
            back = any(later.step > line.step and is_finite(later.loss) for later in self.steps)
            first = f" (mean of steps {line.step - line.mean_of + 1:,} to {line.step:,})" if line.mean_of > 1 else ""
            yield f"loss is {words(line.loss)} {'at' if back else 'from'} step {line.step:,}{first}"
        broken = next((line for line in self.steps if not all(map(math.isfinite, line.norms))), None)
        if broken is not None:
            number = sum(not math.isfinite(norm) for norm in broken.norms)
            yield f"ΔW is not finite from step {broken.step:,}, in {number:,} of {len(self.sites):,} sites"
            if line is None:
                yield "the losses are finite all the same: what gave them has filtered them (logging_nan_inf_filter)"


def is_finite(value: float | None) -> bool:
    """Whether there is a number, and it is neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


def words(value: float) -> str:
    """Return a number as text of three digits; NaN and infinity by their names."""
    if math.isnan(value):
        return "NaN"
    return f"{value:.3g}" if math.isfinite(value) else "infinite" if value > 0 else "-infinite"
