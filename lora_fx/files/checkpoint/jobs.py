"""A merged file as a row of small jobs that are independent of each other, and the threads that do them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Self

import torch

from lora_fx.errors import MergeError
from lora_fx.files.checkpoint.coded import writing as writing_codes
from lora_fx.files.checkpoint.plan import CodeFold, OutShard, OutTensor, Value, WeightFold, Work
from lora_fx.files.checkpoint.rawbytes import RawBytes
from lora_fx.files.checkpoint.report import MergedTensor
from lora_fx.files.checkpoint.rounding import Noise
from lora_fx.files.checkpoint.tiles import (
    OpenTensor,
    ReadTile,
    Scratch,
    Sums,
    Tile,
    cast_tile,
    chunks,
    fold_tile,
    lengths_of,
    needs_lengths,
    tiles,
)
from lora_fx.files.safetensors import RawFile, RawTensor
from lora_fx.files.values import DTYPES
from lora_fx.models.dtypes import name_of_dtype

_COPIED_AT_ONCE = 1 << 24
NoiseOf = Callable[[str], Noise | None]


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of a tensor, or of several, that one thread writes."""

    name: str
    size: int
    """In bytes of the new file."""
    write: Callable[[Scratch], Sums | None]

    def do(self, scratch: Scratch) -> Sums | None:
        """Write it; return the sums of a folded tile.

        Raises:
            MergeError: a value is not finite, or too large for the dtype.
        """
        try:
            return self.write(scratch)
        except OverflowError as error:
            raise MergeError("merging would spoil the checkpoint", [(self.name, str(error))]) from error


class OpenFiles:
    """The files that a merged file is made from, each opened once, and the file itself."""

    def __init__(self, target: Path) -> None:
        self.path = target
        self.target = RawBytes(target, "x+")
        self._sources: dict[Path, RawBytes] = {}

    def source(self, file: RawFile) -> RawBytes:
        if file.path not in self._sources:
            self._sources[file.path] = RawBytes(file.path, "r")
        return self._sources[file.path]

    def tensor(self, file: RawFile, entry: RawTensor) -> OpenTensor:
        """Return where a tensor of a source lies."""
        return OpenTensor(self.source(file), file.data_start + entry.start, DTYPES[entry.dtype])

    def close(self) -> None:
        """Close the new file and all sources."""
        for file in (self.target, *self._sources.values()):
            file.close()


def jobs(shard: OutShard, files: OpenFiles, noise_of: NoiseOf) -> Iterator[Job]:
    """Yield what must be done to write the file, in the order of its bytes; neighbours that stay are copied as one."""
    tensors = shard.tensors
    if shard.header is not None:
        files.target.write_from(memoryview(shard.header), 0)
    else:  # it stays: bytes before those of the first tensor
        header = RawTensor("U8", (shard.data_start,), -shard.data_start, 0)
        tensors = (OutTensor("header", header, header, None), *tensors)
    for shift, neighbours in groupby(tensors, _shift):
        if shift is None:
            for tensor in neighbours:
                yield from _tensor_jobs(tensor, shard, files, noise_of(tensor.name))
        else:
            yield from _copy_jobs(list(neighbours), shift, shard, files)


def _shift(tensor: OutTensor) -> int | None:
    """Return by how much the bytes of a tensor move to the front; None if they change."""
    if tensor.base is None or tensor.work is not None or tensor.base.dtype != tensor.entry.dtype:
        return None
    return tensor.base.start - tensor.entry.start


def _copy_jobs(tensors: Sequence[OutTensor], shift: int, shard: OutShard, files: OpenFiles) -> Iterator[Job]:
    """Yield the jobs for tensors that stay and lie side by side, in the base as in the new file."""
    source, end = files.source(shard.source), tensors[-1].entry.end
    for start in range(tensors[0].entry.start, end, _COPIED_AT_ONCE):
        size = min(_COPIED_AT_ONCE, end - start)
        position, target = shard.source.data_start + start + shift, shard.data_start + start
        yield Job(tensors[0].name, size, partial(_copy, files.target, source, position, target, size))


def _copy(file: RawBytes, source: RawBytes, position: int, target: int, size: int, _: Scratch) -> None:
    file.copy_from(source, position, target, size)


def _tensor_jobs(tensor: OutTensor, shard: OutShard, files: OpenFiles, noise: Noise | None) -> Iterator[Job]:
    target = OpenTensor(files.target, shard.data_start + tensor.entry.start, DTYPES[tensor.entry.dtype])
    if isinstance(tensor.work, CodeFold):
        for size, write in writing_codes(tensor.work, lambda located: files.tensor(*located), target):
            yield Job(tensor.name, size, write)
        return
    if isinstance(tensor.work, WeightFold):
        writing = _folding(tensor.work, files.tensor(tensor.work.file, tensor.work.base), target, noise)
    else:
        writing = _casting(_reader(tensor, shard, files), tensor.entry.elements, target, noise)
    for tile, write in writing:
        yield Job(tensor.name, tile.elements * target.dtype.itemsize, write)


def _reader(tensor: OutTensor, shard: OutShard, files: OpenFiles) -> ReadTile:
    """Return what reads the values of a tensor that was trained whole, or that is only cast."""
    if isinstance(tensor.work, Value):
        return partial(_part_of, tensor.work.tensor.reshape(-1))
    assert tensor.base is not None
    return files.tensor(shard.source, tensor.base).read


def _part_of(flat: torch.Tensor, tile: Tile, _: Scratch) -> torch.Tensor:
    return flat[tile.columns]


Writing = Iterator[tuple[Tile, Callable[[Scratch], Sums | None]]]


def _folding(fold: WeightFold, source: OpenTensor, target: OpenTensor, noise: Noise | None) -> Writing:
    lengths = None
    for number, tile in enumerate(tiles(fold.rows, fold.columns, fold.rank)):
        if number == 0 and needs_lengths(fold, tile):
            lengths = lengths_of(fold, source, Scratch())
        yield tile, partial(fold_tile, fold, tile, source, target, noise, lengths)


def _casting(read: ReadTile, elements: int, target: OpenTensor, noise: Noise | None) -> Writing:
    for tile in chunks(elements):
        yield tile, partial(cast_tile, read, tile, target, noise)


# -- threads


class Workers:
    """Threads with memory of their own, kept from file to file; the calling thread is one of them.

    A thread that only gives out jobs would need Python's lock after each, and the others would wait for it.
    """

    def __init__(self, number: int) -> None:
        self._own, *self._others = (Scratch() for _ in range(number))
        self._threads = ThreadPoolExecutor(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def run(self, todo: Iterator[Job], done: Callable[[Job, Sums | None], object]) -> None:
        """Do all jobs and pass each result to `done`, in the calling thread; after an error others end theirs."""
        row = _Row(todo)
        running = [self._threads.submit(row.work, scratch) for scratch in self._others]
        try:
            row.work(self._own, lambda: row.tell(done))
        finally:
            row.end()
            wait(running)
        for future in running:
            future.result()
        row.tell(done)


class _Row:
    """Jobs that several threads take, one after the other, until all are done or one has failed."""

    def __init__(self, todo: Iterator[Job]) -> None:
        self._todo, self._lock = todo, threading.Lock()
        self._done: deque[tuple[Job, Sums | None]] = deque()

    def work(self, scratch: Scratch, after_each: Callable[[], object] = lambda: None) -> None:
        """Do jobs as long as there are any."""
        try:
            while (job := self._take()) is not None:
                self._done.append((job, job.do(scratch)))
                after_each()
        except BaseException:
            self.end()
            raise

    def _take(self) -> Job | None:
        with self._lock:
            return next(self._todo, None)

    def end(self) -> None:
        """Let no thread take another job."""
        with self._lock:
            self._todo = iter(())

    def tell(self, done: Callable[[Job, Sums | None], object]) -> None:
        """Pass on what was done since; one thread alone may call it."""
        while self._done:
            done(*self._done.popleft())


# -- what the report says of it


def report_rows(shard: OutShard, sums: dict[str, Sums]) -> list[MergedTensor]:
    """Return what the report says of the file's tensors that are not the base's."""
    changed = ((tensor, tensor.work) for tensor in shard.tensors if tensor.work is not None)
    return [_row(tensor, work, sums.get(tensor.name, Sums())) for tensor, work in changed]


def _row(tensor: OutTensor, work: Work, sums: Sums) -> MergedTensor:
    changed = "replaced" if isinstance(work, Value) else "merged"
    return MergedTensor(
        name=tensor.name,
        shape=tensor.entry.shape,
        dtype=name_of_dtype(DTYPES[tensor.entry.dtype]),
        how="added" if tensor.base is None else changed,
        adapters=work.adapters,
        relative_delta=_short(sqrt(sums.delta / sums.base)) if sums.base else None,
        survived=_short(sums.survived / sums.delta) if sums.delta else None,
        kept=_short(1 - sqrt(sums.missed / sums.effect)) if sums.effect else None,
    )


def _short(number: float) -> float:
    """Return the number without the digits that depend on which thread came first."""
    return float(f"{number:.6g}")
