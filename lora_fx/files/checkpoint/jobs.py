"""A merged file as a row of small jobs that are independent of each other, and the threads that do them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Self

import torch

from lora_fx.errors import MergeError
from lora_fx.files.checkpoint.layout import OutShard, OutTensor
from lora_fx.files.checkpoint.plan import Value, WeightFold
from lora_fx.files.checkpoint.rawbytes import RawBytes
from lora_fx.files.checkpoint.report import MergedTensor
from lora_fx.files.checkpoint.rounding import Noise
from lora_fx.files.checkpoint.tiles import (
    OpenTensor,
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
from lora_fx.files.safetensors import RawFile
from lora_fx.files.values import DTYPES

_COPIED_AT_ONCE = 1 << 24
NoiseOf = Callable[[str], Noise | None]


@dataclass(frozen=True, slots=True)
class Done:
    """What a job has written: bytes, and for a folded tile its sums."""

    name: str
    size: int
    sums: Sums | None = None


Job = Callable[[Scratch], Done]


class OpenFiles:
    """The files that a merged file is made from, each opened once, and the file itself."""

    def __init__(self, target: Path) -> None:
        self.path = target
        self.target = RawBytes(target, "w+")
        self._sources: dict[Path, RawBytes] = {}

    def source(self, file: RawFile) -> RawBytes:
        if file.path not in self._sources:
            self._sources[file.path] = RawBytes(file.path, "r")
        return self._sources[file.path]

    def close(self) -> None:
        """Close the new file and all sources."""
        for file in (self.target, *self._sources.values()):
            file.close()


def jobs(shard: OutShard, files: OpenFiles, noise_of: NoiseOf) -> Iterator[Job]:
    """Yield what must be done to write the file, in the order of its bytes; neighbours that stay are copied as one."""
    if shard.header is not None:
        files.target.write_from(memoryview(shard.header), 0)
    for step in _steps(shard):
        if isinstance(step, _Range):
            yield from _copy_jobs(step, shard, files)
        else:
            yield from _tensor_jobs(step, shard, files, noise_of(step.name))


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes of the source file that are copied to a place in the new one."""

    name: str
    source: int
    target: int
    size: int

    def joined(self, other: _Range) -> _Range | None:
        """Return both as one, None where something lies between them."""
        follows = (self.source + self.size, self.target + self.size) == (other.source, other.target)
        return _Range(self.name, self.source, self.target, self.size + other.size) if follows else None


def _steps(shard: OutShard) -> Iterator[_Range | OutTensor]:
    """Yield the header if it stays, then ranges that stay, as long as can be, and the tensors that do not."""
    last = _Range("header", 0, 0, shard.data_start if shard.header is None else 0)
    for tensor in shard.tensors:
        if tensor.base is None or tensor.work is not None or tensor.base.dtype != tensor.entry.dtype:
            yield from (last, tensor)
            last = _Range(tensor.name, 0, 0, 0)
            continue
        source, target = shard.source.data_start + tensor.base.start, shard.data_start + tensor.entry.start
        kept = _Range(tensor.name, source, target, tensor.base.end - tensor.base.start)
        joined = last.joined(kept)
        if joined is None:
            yield last
        last = joined or kept
    yield last


def _copy_jobs(copied: _Range, shard: OutShard, files: OpenFiles) -> Iterator[Job]:
    for start in range(0, copied.size, _COPIED_AT_ONCE):
        size = min(_COPIED_AT_ONCE, copied.size - start)
        part = _Range(copied.name, copied.source + start, copied.target + start, size)
        yield partial(_copy, part, files.source(shard.source), files.target)


def _copy(part: _Range, source: RawBytes, target: RawBytes, scratch: Scratch) -> Done:
    target.copy_from(source, part.source, part.target, part.size)
    return Done(part.name, part.size)


def _tensor_jobs(tensor: OutTensor, shard: OutShard, files: OpenFiles, noise: Noise | None) -> Iterator[Job]:
    target = OpenTensor(files.target, shard.data_start + tensor.entry.start, DTYPES[tensor.entry.dtype])
    if isinstance(tensor.work, WeightFold):
        yield from _fold_jobs(tensor.name, tensor.work, files, target, noise)
    elif isinstance(tensor.work, Value):
        for tile in chunks(tensor.entry.elements):
            yield partial(_put_value, tensor.name, tensor.work, tile, target, noise)
    else:
        assert tensor.base is not None
        start = shard.source.data_start + tensor.base.start
        source = OpenTensor(files.source(shard.source), start, DTYPES[tensor.base.dtype])
        for tile in chunks(tensor.entry.elements):
            yield partial(_cast, tensor.name, tile, source, target, noise)


def _fold_jobs(name: str, fold: WeightFold, files: OpenFiles, target: OpenTensor, noise: Noise | None) -> Iterator[Job]:
    source = OpenTensor(files.source(fold.file), fold.file.data_start + fold.base.start, DTYPES[fold.base.dtype])
    lengths = None
    for number, tile in enumerate(tiles(fold.rows, fold.columns, fold.rank)):
        if number == 0 and needs_lengths(fold, tile):
            lengths = lengths_of(fold, source, Scratch())
        yield partial(_fold, name, fold, tile, source, target, noise, lengths)


def _fold(
    name: str,
    fold: WeightFold,
    tile: Tile,
    source: OpenTensor,
    target: OpenTensor,
    noise: Noise | None,
    lengths: torch.Tensor | None,
    scratch: Scratch,
) -> Done:
    with _named(name):
        sums = fold_tile(fold, tile, source, target, noise, lengths, scratch)
    return Done(name, tile.elements * target.dtype.itemsize, sums)


def _put_value(name: str, value: Value, tile: Tile, target: OpenTensor, noise: Noise | None, scratch: Scratch) -> Done:
    with _named(name):
        cast_tile(value.tensor.reshape(-1)[tile.columns], tile, target, noise, scratch)
    return Done(name, tile.elements * target.dtype.itemsize)


def _cast(name: str, tile: Tile, source: OpenTensor, target: OpenTensor, noise: Noise | None, scratch: Scratch) -> Done:
    with _named(name):
        cast_tile(source.read(tile, scratch), tile, target, noise, scratch)
    return Done(name, tile.elements * target.dtype.itemsize)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except OverflowError as error:
        raise MergeError("merging would spoil the checkpoint", [(name, str(error))]) from error


# -- threads


class Workers:
    """Threads with memory of their own, kept from file to file; with one, the calling thread does the work."""

    def __init__(self, number: int) -> None:
        self._scratch = [Scratch() for _ in range(number)]
        self._threads = ThreadPoolExecutor(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def run(self, todo: Iterator[Job], done: Callable[[Done], object]) -> None:
        """Do all jobs and pass each result to `done`, in the calling thread; after an error others end theirs."""
        if len(self._scratch) == 1:
            for job in todo:
                done(job(self._scratch[0]))
            return
        shared = _Shared(todo)
        working = [self._threads.submit(shared.work, scratch) for scratch in self._scratch]
        try:
            shared.tell(done, len(working))
        finally:
            shared.stop.set()
            wait(working)


class _Shared:
    """What the threads of one run share."""

    def __init__(self, todo: Iterator[Job]) -> None:
        self.todo = todo
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.results: queue.SimpleQueue[Done | BaseException | None] = queue.SimpleQueue()

    def work(self, scratch: Scratch) -> None:
        try:
            while not self.stop.is_set():
                with self.lock:
                    job = next(self.todo, None)
                if job is None:
                    break
                self.results.put(job(scratch))
        except BaseException as error:  # raised again where the results are read
            self.stop.set()
            self.results.put(error)
        finally:
            self.results.put(None)

    def tell(self, done: Callable[[Done], object], running: int) -> None:
        while running:
            result = self.results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                done(result)


# -- what the report says of it


def report_rows(shard: OutShard, sums: dict[str, Sums]) -> list[MergedTensor]:
    """Return what the report says of the file's tensors that are not the base's."""
    return [_row(tensor, sums.get(tensor.name, Sums())) for tensor in shard.tensors if tensor.work is not None]


def _row(tensor: OutTensor, sums: Sums) -> MergedTensor:
    dtype = str(DTYPES[tensor.entry.dtype]).removeprefix("torch.")
    if isinstance(tensor.work, Value):
        how = "added" if tensor.base is None else "replaced"
        return MergedTensor(tensor.name, tensor.entry.shape, dtype, how, (tensor.work.adapter,))
    assert tensor.work is not None
    return MergedTensor(
        name=tensor.name,
        shape=tensor.entry.shape,
        dtype=dtype,
        how="merged" if tensor.base is not None else "added",
        adapters=tensor.work.adapters,
        relative_delta=_short(sqrt(sums.delta / sums.base)) if sums.base else None,
        survived=_short(sums.survived / sums.delta) if sums.delta else None,
    )


def _short(number: float) -> float:
    """Return the number without the digits that depend on which thread came first."""
    return float(f"{number:.6g}")
