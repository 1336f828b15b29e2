"""The record of a training run: read from its file, shown as text, JSON, picture and page.  Needs no torch."""

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import columns, count, json_text, listing
from lora_fx.training.curves import chart, picked, smoothed, sparkline
from lora_fx.training.history import History, is_finite, words
from lora_fx.training.lines import RecordLines, name_of
from lora_fx.training.picture import record_html, record_svg

_WIDTH, _HEIGHT, _SPARK = 56, 6, 24
_MOST_LAYERS = 12
_MOST_LINES = 10 * _SPARK
"""Of which curves of norms are made."""


@dataclass(frozen=True, slots=True)
class TrainingRecord(InNotebook, History):
    """What `lora_fx.read_record` returns: the losses of a run, and ‖ΔW‖ of every adapter at the same steps."""

    def __str__(self) -> str:
        lines = [self._sums(), *(f"  ! {warning}" for warning in self.warnings())]
        if self.losses():
            lines += ["", *self._losses()]
        if self.steps:
            lines += ["", *self._layers()]
        return "\n".join([*lines, *self._notes()])

    def _sums(self) -> str:
        where = f"{count(len(self.sites), 'site')} in {count(len(self.layers), 'layer')}"
        if not self.steps:
            return f"{self.model} · {where} · no step yet"
        reached = f"step {self.steps[-1].step:,}"
        return f"{self.model} · {where} · {reached} · {count(len(self.steps), 'line')}"

    def _losses(self) -> list[str]:
        points = self.losses()
        finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
        facts = [("first", points[0]), ("last", points[-1])]
        if finite:
            facts += [("lowest", min(finite, key=lambda point: point[1])), ("smoothed", smoothed(points)[-1])]
        told = [f"{name} {words(loss)}" + (f" (step {step:,})" * (name == "lowest")) for name, (step, loss) in facts]
        drawn = chart([loss for _, loss in points], _WIDTH, _HEIGHT)
        return [f"  loss  {', '.join(told)}", "", *(f"  {line}".rstrip() for line in drawn)]

    def _layers(self) -> list[str]:
        over = [self.layer_norms(self.steps[k]) for k in picked(len(self.steps), _MOST_LINES)]
        rows = [
            (layer, words(over[-1][k]), sparkline([norms[k] for norms in over], _SPARK))
            for k, layer in enumerate(self.layers)
        ]
        shown, left = _most_and_least(over[-1])
        lines = [columns([("layer", "‖ΔW‖", "over the steps"), *(rows[k] for k in shown)])]
        if left:
            lines.append(f"  … {count(left, 'layer')} more, whose ‖ΔW‖ is between these")
        if len(rows) > 1 and all(map(is_finite, over[-1])):
            most, least = (chosen(range(len(rows)), key=over[-1].__getitem__) for chosen in (max, min))
            lines += ["", f"  moved most {self.layers[most]}, least {self.layers[least]}"]
        return lines

    def _notes(self) -> list[str]:
        notes = []
        if still := self.untrained():
            notes.append(f"  not trained, ΔW is 0: {listing(site.name for site in still)}")
        if self.replaced:
            notes.append(f"  {count(self.replaced, 'line')} left out: the run went back to a checkpoint")
        if self.cut:
            notes.append("  the last line is cut off, and left out")
        return ["", *notes] if notes else []

    def to_json(self) -> str:
        """Return all of it as JSON; numbers that are not finite as "NaN", "Infinity", "-Infinity"."""
        return json_text(_plain({"schema_version": 1, **asdict(self)}), indent=1)

    def to_svg(self) -> str:
        """Return two panels: the losses with their smoothing, and ‖ΔW‖ by layer over the steps."""
        return record_svg(self)

    def to_html(self) -> str:
        """Return one page that needs nothing else: both panels, and a table of all sites."""
        return record_html(self, self._sums())


def _most_and_least(norms: list[float]) -> tuple[list[int], int]:
    """Return which layers are shown, in the order of the model, and how many are not."""
    if len(norms) <= _MOST_LAYERS:
        return list(range(len(norms))), 0
    by_size = sorted(range(len(norms)), key=lambda k: norms[k] if is_finite(norms[k]) else math.inf)
    half = _MOST_LAYERS // 2
    return sorted(by_size[:half] + by_size[-half:]), len(norms) - _MOST_LAYERS


def _plain(value: Any) -> Any:
    """Return a document with what JSON has no numbers for as strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return name_of(value)
    return value if isinstance(value, (str, int, float, type(None))) else [_plain(item) for item in value]


def recorded(history: History) -> TrainingRecord:
    """Return what a file holds as a record that can be shown."""
    return TrainingRecord(history.model, history.lora_fx, history.sites, history.steps, history.replaced, history.cut)


def read_record(path: str | os.PathLike[str]) -> TrainingRecord:
    """Return the record of a training run that a `Recorder` has written; needs no torch.

    A last line that is cut off, as a crash leaves it, is left out.  Where a run went back to a checkpoint and made
    steps again, those of the second time are returned.

    Args:
        path: of the file, which may be written at the same time.

    Raises:
        RecordFileError: it is missing, no record, damaged, or too large; says which line.
    """
    return recorded(RecordLines(path).read())
