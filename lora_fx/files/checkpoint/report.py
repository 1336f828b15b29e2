"""What a streaming merge did to each tensor, and how much of the adapters survived the rounding."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import columns, count, json_text, visible

_MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor that is not the base's.

    With W the base, D the exact delta and W' what was written, `relative_delta` is ‖D‖ / ‖W‖ and `survived` is
    ⟨W' − W, D⟩ / ‖D‖²: 1 if rounding lost nothing, 0 if it lost all.  Both are None where there is no delta.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    how: str
    """`merged`, `replaced` (trained whole) or `added` (the base has no such tensor)."""
    adapters: tuple[str, ...]
    relative_delta: float | None = None
    survived: float | None = None
    kept: float | None = None
    """Where codes are chosen by inputs X that were not used for it: 1 - ‖(W' − W − D) X‖ / ‖D X‖."""

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, for `from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "MergedTensor":
        """Return what `to_dict` gave, also after a journey through JSON."""
        return MergedTensor(**{**saved, "shape": tuple(saved["shape"]), "adapters": tuple(saved["adapters"])})

    def share(self) -> float:
        """Return what is left of the adapter: of its effect where that is known, else of its delta."""
        return (self.survived or 0.0) if self.kept is None else self.kept

    def row(self) -> tuple[str, ...]:
        size = " × ".join(map(str, self.shape))
        if self.relative_delta is None:
            return (self.name, size, self.dtype, self.how)
        survived = "" if self.survived is None else f"survived {self.survived:.1%}"
        if self.kept is not None:
            survived = f"kept {self.kept:.1%}"
        return (self.name, size, self.dtype, self.how, f"‖Δ‖/‖W‖ {self.relative_delta:.2g}", survived)


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport(InNotebook):
    """What `merge_checkpoint` wrote; `str()` gives a summary."""

    folder: str
    tensors: tuple[MergedTensor, ...]
    """Those that are not the base's, by file and place in it."""
    untouched: int
    """How many tensors are the base's, byte by byte (or cast, with `out_dtype`)."""
    carried: tuple[str, ...]
    """Files that were copied along."""
    left_out: tuple[str, ...]
    """Files of the base that hold its weights in other forms; they were not copied."""
    untied: bool
    """Whether config.json now says that head and embedding are two tensors."""

    def __str__(self) -> str:
        return self.text()

    def text(self, everything: bool = False) -> str:
        """Return a summary with the tensors of which rounding took the most, or with all."""
        ways = Counter(tensor.how for tensor in self.tensors)
        parts = [f"{number:,} {how}" for how, number in sorted(ways.items())]
        lines = [f"{visible(str(self.folder))}: {', '.join([*parts, f'{self.untouched:,} untouched'])}"]
        lines += [columns([tensor.row() for tensor in self._shown(everything)])] if self.tensors else []
        if self.untied:
            lines.append("  config.json: tie_word_embeddings is false now, since head and embedding differ")
        if self.left_out:
            lines.append(f"  left out, as the unmerged weights are in {count(len(self.left_out), 'other file')}:")
            lines.append(columns([(name,) for name in self.left_out], indent="    "))
        return "\n".join(lines)

    def _shown(self, everything: bool) -> Sequence[MergedTensor]:
        if everything:
            return self.tensors
        measured = [tensor for tensor in self.tensors if tensor.survived is not None]
        return sorted(measured, key=MergedTensor.share)[:_MOST_SHOWN]

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json_text(asdict(self), indent=2)
