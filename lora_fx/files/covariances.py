"""What the inputs of adapted layers are like on a model's data, in a file: a merge on disk chooses codes by it.

Of each layer two matrices X Xᵀ [in, in] in float32, `PATH.rounding` of the batches to round by and `PATH.held` of those
that show what it gives: 8 · in² bytes.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_fx.adapters.attach import owner_path, with_values
from lora_fx.errors import MergeError, RefusedError
from lora_fx.files.fingerprint import VALUES, sample_values
from lora_fx.files.replacing import staged
from lora_fx.files.safetensors import RawFile, RawTensor, header_bytes, read_raw
from lora_fx.files.values import refuse_unwritable
from lora_fx.models.modes import making
from lora_fx.models.quantised import dense, is_quantised
from lora_fx.models.wrappers import seen_through
from lora_fx.progress.steps import ShowProgress, step
from lora_fx.sources.document import parse_json
from lora_fx.sources.regular import UnreadableError
from lora_fx.tuned.moments import Given, at_once, is_linear, moments_of, parted
from lora_fx.tuned.requantise import sites_in_use
from lora_fx.tuned.switching import Adapters, chosen_for_a_while
from lora_fx.tuned.undo import merged

_PARTS = ("rounding", "held")
_MARK, _VALUES = "lora_fx.covariances", "values"


def input_covariances(
    tuned: nn.Module,
    data: Iterable[object],
    path: str | os.PathLike[str],
    *,
    adapters: Adapters = None,
    progress: ShowProgress = None,
) -> list[str]:
    """Write what the adapted linear layers of a model are given on the data, and return their paths.

    `merge_checkpoint(…, covariances=path)` then chooses the codes of a quantised checkpoint as `merged_on_grid` does.
    The layers are looked at in the merged model; the adapted one stays unchanged.  The file takes 8 · in² bytes for
    each layer; 1 GB of it is in memory at a time, for which the model runs on the data several times.

    Args:
        tuned: an adapted model.
        data: two batches or more, each as `example_inputs` of `plan`, on the model's device.
        path: of the file, which is written whole or not at all; one that is there is replaced.
        adapters: as for `merge`: those that will be merged.
        progress: as for `plan`.

    Raises:
        RefusedError: fewer than two batches, no adapted linear layer, one that the data does not reach, a sharded
            model, a path that cannot be written; nothing is written.
        MergeError: as `merge`.
    """
    tuned, place = with_values(seen_through(tuned)), Path(path)
    rounding, held = parted(data)
    with chosen_for_a_while(tuned, adapters), making("look at inputs", progress, 4):
        layers = _layers(tuned)
        model = merged(tuned, stays_plain=False)
        header = header_bytes(_entries(layers), {_MARK: "1", _VALUES: json.dumps(_values(tuned))})
        with contextlib.ExitStack() as opened, step("looking at inputs", len(layers), "layers") as doing:
            with _told(place):
                file = opened.enter_context(opened.enter_context(staged(place, _refuse_folder)).open("xb", buffering=0))
                _write(file, header)
            for some in at_once(layers):
                met = moments_of(model, some, rounding, held)
                with _told(place):
                    for moment in (moment for found in met.values() for moment in found):
                        _write(file, moment.total.float().cpu().contiguous().numpy().data.cast("B"))
                for name in met:
                    doing.advance(name)
            with _told(place):
                opened.pop_all().close()
    return [layer.path for layer in layers]


@contextlib.contextmanager
def _told(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        facts = [(str(place), error.strerror or str(error))]
        raise RefusedError("covariances cannot be written", facts) from error


def _write(file: io.FileIO, content: bytes | memoryview) -> None:
    """Write all of it now: a buffer would try again when it is closed, and its error hide the one that is told."""
    left = memoryview(content)
    while len(left):
        left = left[file.write(left) :]


def _layers(tuned: nn.Module) -> list[Given]:
    found = [(path, owner_path(path, adapter), adapter) for path, adapter in sites_in_use(tuned)]
    layers = [
        Given(path, owner, adapter.base_weight.shape[1])
        for path, owner, adapter in found
        if is_linear(tuned, owner, adapter)
    ]
    if not layers:
        raise RefusedError("no adapter is in use at a linear layer: no inputs to look at")
    refuse_unwritable(layer.path for layer in layers)
    return layers


def _values(tuned: nn.Module) -> dict[str, list[float] | None]:
    """Return a few numbers of each base weight that is codes: those of one that will be quantised yet will differ."""
    weights = ((path, adapter.base_weight) for path, adapter in sites_in_use(tuned))
    return {path: sample_values(dense(weight)) for path, weight in weights if is_quantised(weight)}


def _entries(layers: Sequence[Given]) -> Iterable[tuple[str, RawTensor]]:
    position = 0
    for layer in layers:
        for part in _PARTS:
            end = position + 4 * layer.width**2
            yield f"{layer.path}.{part}", RawTensor("F32", (layer.width, layer.width), position, end)
            position = end


def _refuse_folder(_new: Path, old: Path) -> None:
    if old.is_dir():
        raise RefusedError("covariances are one file", [(str(old), "is a directory")])


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Where X Xᵀ of a layer's inputs lies: of batches to round by, and of those that were held back."""

    rounding: tuple[RawFile, RawTensor]
    held: tuple[RawFile, RawTensor]
    values: list[float] | None
    """A few of the base's numbers, to know it by."""


@dataclass(frozen=True, slots=True)
class Covariances:
    """A file that `input_covariances` wrote, opened."""

    file: RawFile
    values: dict[str, list[float] | None]

    def of(self, path: str, width: int) -> LayerInputs | str:
        """Return where those of a site are, or why there are none for a weight of so many columns."""
        entries = [self.file.tensors.get(f"{path}.{part}") for part in _PARTS]
        if entries[0] is None or entries[1] is None:
            return f"the file has no covariance of {path}"
        if any(entry is None or entry.dtype != "F32" or entry.shape != (width, width) for entry in entries):
            return f"the file has {list(entries[0].shape)} of {path}, for rows of {width}"
        return LayerInputs((self.file, entries[0]), (self.file, entries[1]), self.values.get(path))


def read_covariances(path: str | os.PathLike[str]) -> Covariances:
    """Return what a file of covariances holds; no matrix is read.

    Raises:
        MergeError: it is missing, cut off, or of another kind.
    """
    file = read_raw(Path(path))
    if file.metadata.get(_MARK) != "1":
        raise MergeError(f"{file.path}: is no file of `lora_fx.input_covariances`")
    try:
        values = parse_json(file.metadata.get(_VALUES, "{}").encode())
        right = all(noted is None or [*map(type, noted)] == [float] * VALUES for noted in values.values())
    except (UnreadableError, AttributeError, TypeError):
        right = False
    if not right:
        raise MergeError(f"{file.path}: is damaged: what it notes of the base is no table of numbers")
    return Covariances(file, values)
