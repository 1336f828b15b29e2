"""The file of a record, line by line: one JSON object in each.  Written by the Recorder, read here; no torch.

The first line is the header, each other one a step.  What JSON has no numbers for is written as a string: "NaN",
"Infinity", "-Infinity".  What stands behind the last line's end was cut off while it was written, and is passed over.
"""

import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from lora_fx.errors import LONGEST_NAME, LoraFxError
from lora_fx.sources.document import parse_json
from lora_fx.sources.regular import UnreadableError, open_regular
from lora_fx.sources.structure import MOST, structured
from lora_fx.text import json_text, shortened
from lora_fx.training.history import History, RecordedSite, RecordedStep

SCHEMA_VERSION = 1
KIND = "lora_fx training record"
BEGINNING = f'{{"schema_version": {SCHEMA_VERSION}, "kind": "{KIND}", '.encode()
"""With this every file of ours begins."""
MOST_RECORD_BYTES = 4 * 1024**3
MOST_LINE_BYTES = 64 * 1024**2
MOST_LINES = 10_000_000
_LARGEST = 1e100
"""What is larger counts as infinite: squares and sums of the rest are finite."""
_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RecordFileError(LoraFxError):
    """A file holds no record of a training run, is damaged, is of another run, or cannot be written."""


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The first line."""

    schema_version: int
    kind: str
    lora_fx: str
    model: str
    sites: tuple[RecordedSite, ...]


# -- written


def header_line(model: str, lora_fx: str, sites: Sequence[RecordedSite]) -> bytes:
    """Return the header of a file."""
    document = {"schema_version": SCHEMA_VERSION, "kind": KIND, "lora_fx": lora_fx, "model": model}
    return json_text(document | {"sites": [asdict(site) for site in sites]}).encode() + b"\n"


def step_line(line: RecordedStep) -> bytes:
    """Return the line of a step; 8 digits of the loss and 6 of the norms."""
    loss = None if line.loss is None else _spelt(line.loss, 8)
    norms = [_spelt(norm, 6) for norm in line.norms]
    return json_text({"step": line.step, "loss": loss, "mean_of": line.mean_of, "norms": norms}).encode() + b"\n"


def _spelt(value: float, digits: int) -> float | str:
    return float(f"{value:.{digits}g}") if abs(value) < _LARGEST else name_of(value)


def name_of(value: float) -> str:
    """Return the string that stands for a number that is not finite, or counts as such."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# -- read


class RecordLines:
    """A record's file that is read as it grows: each call of `read` takes up the lines that are new.

    Nothing of a damaged file is kept: the error comes before the history of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._start_anew()

    def _start_anew(self) -> None:
        self.header: RecordHeader | None = None
        self.size = 0
        """Bytes of whole lines that have been read."""
        self.cut = False
        self._file: tuple[int, int] | None = None
        self._number = 0
        self._steps: list[RecordedStep] = []
        self._replaced = 0

    def read(self) -> History:
        """Return what the file holds by now.

        Raises:
            RecordFileError: it is missing, no record, damaged, or larger than it may be; says which line.
        """
        try:
            with open_regular(self.path, MOST_RECORD_BYTES) as file:
                status = os.fstat(file.fileno())
                if self._file != (status.st_dev, status.st_ino) or status.st_size < self.size:
                    self._start_anew()  # it is read for the first time, or is another file of that name
                    self._file = status.st_dev, status.st_ino
                file.seek(self.size)
                for line in self._whole_lines(file):
                    self._take(line)
            if self.header is None:
                raise UnreadableError("holds no record of a training run yet" if self.cut else "is empty")
        except (UnreadableError, OSError) as error:
            self._start_anew()
            reason = error if isinstance(error, UnreadableError) else f"cannot be read: {error.strerror or error}"
            raise RecordFileError(f"{shortened(self.path, LONGEST_NAME)}: {reason}") from error
        header = self.header
        return History(header.model, header.lora_fx, header.sites, tuple(self._steps), self._replaced, self.cut)

    def _whole_lines(self, file: IO[bytes]) -> Iterator[bytes]:
        """Yield the lines that have an end; of a file without any, only what can be the beginning of a record."""
        self.cut = False
        while line := file.readline(MOST_LINE_BYTES + 1):
            if len(line) > MOST_LINE_BYTES:
                raise UnreadableError(f"line {self._number + 1:,} has more than {MOST_LINE_BYTES:,} bytes")
            if not line.endswith(b"\n"):
                self.cut = True
                if self.header is None and not is_beginning(line):
                    raise UnreadableError("is no record of a training run")
                return
            self._number += 1
            if self._number > MOST_LINES:
                raise UnreadableError(f"has more than {MOST_LINES:,} lines")
            yield line
            self.size += len(line)

    def _take(self, line: bytes) -> None:
        if self.header is None:
            if not is_beginning(line):
                raise UnreadableError("is no record of a training run")
            self.header = header_of(line)
            return
        try:
            step = _step(parse_json(line), len(self.header.sites))
        except UnreadableError as error:
            raise UnreadableError(f"line {self._number:,} {error}") from error
        while self._steps and self._steps[-1].step >= step.step:
            self._steps.pop()
            self._replaced += 1
        self._steps.append(step)


def is_beginning(content: bytes) -> bool:
    """Whether a file that begins so, and may be cut off behind it, can be a record."""
    return content.startswith(BEGINNING) or BEGINNING.startswith(content)


def header_of(line: bytes) -> RecordHeader:
    """Return the header that the first line of a file holds.

    Raises:
        UnreadableError: it holds none, or one that is too large.
    """
    if len(line) > MOST_LINE_BYTES:
        raise UnreadableError(f"line 1 has more than {MOST_LINE_BYTES:,} bytes")
    header = structured(RecordHeader, parse_json(line), "header")
    if header.schema_version != SCHEMA_VERSION or header.kind != KIND:
        raise UnreadableError(f"is not of schema version {SCHEMA_VERSION}, which this lora_fx reads")
    if not header.sites:
        raise UnreadableError("has no sites")
    if len({(site.path, site.call, site.adapter) for site in header.sites}) < len(header.sites):
        raise UnreadableError("has a site twice")
    return header


def _step(document: Any, sites: int) -> RecordedStep:
    if not isinstance(document, dict) or document.keys() != {"step", "loss", "mean_of", "norms"}:
        raise UnreadableError("is not the line of a step")
    step, mean_of, norms = document["step"], document["mean_of"], document["norms"]
    for name, value, least in (("step", step, 0), ("mean_of", mean_of, 0)):
        if type(value) is not int or not least <= value < MOST:
            raise UnreadableError(f"has a {name} that is no whole number")
    if not isinstance(norms, list) or len(norms) != sites:
        raise UnreadableError(f"does not have {sites:,} norms, as the header has sites")
    loss = None if document["loss"] is None else _number(document["loss"], "loss")
    return RecordedStep(step, loss, mean_of, _norms(norms))


def _norms(norms: list[Any]) -> "array[float]":
    if set(map(type, norms)) == {float}:  # of a file with 100,000 lines each is worth a look
        values = array("d", norms)
        if math.isfinite(sum(values)) and max(values) < _LARGEST and min(values) >= 0:
            return values
    values = array("d", (_number(norm, "norm") for norm in norms))
    if any(value < 0 for value in values):
        raise UnreadableError("has a norm below 0")
    return values


def _number(value: object, name: str) -> float:
    if type(value) is float or type(value) is int:
        if -_LARGEST < value < _LARGEST:
            return float(value)
    elif isinstance(value, str) and value in _NAMED:
        return _NAMED[value]
    raise UnreadableError(f"has a {name} that is no number")
