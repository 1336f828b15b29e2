"""Adapters merged into a checkpoint on disk, tile by tile: no model object, and memory that does not grow with it."""

import contextlib
import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import LONGEST_NAME, MergeError
from lora_fx.files.adapter.read import AdapterFile, read_adapters
from lora_fx.files.atomic import place_in, settle
from lora_fx.files.checkpoint import tied
from lora_fx.files.checkpoint.basefiles import CONFIG, BaseCheckpoint, read_checkpoint, read_object
from lora_fx.files.checkpoint.jobs import Job, OpenFiles, Workers, jobs, report_rows
from lora_fx.files.checkpoint.outfolder import (
    MergeJournal,
    carry,
    check_folder,
    entered,
    free_bytes,
    fresh_part_of,
    inputs_of,
    is_read_only,
    open_journal,
    part_of,
    size_and_time,
    write_whole,
)
from lora_fx.files.checkpoint.plan import CodeFold, MergePlan, OutShard, out_shard
from lora_fx.files.checkpoint.rawbytes import Syncing
from lora_fx.files.checkpoint.report import MergeReport
from lora_fx.files.checkpoint.rounding import ROUNDINGS, Noise
from lora_fx.files.checkpoint.sites import plan_merge
from lora_fx.files.checkpoint.tiles import Sums
from lora_fx.files.covariances import read_covariances
from lora_fx.files.values import DTYPES, FLOATS
from lora_fx.models.dtypes import warn_of_narrowed_file
from lora_fx.progress.steps import Progress
from lora_fx.sources.regular import UnreadableError, check_path
from lora_fx.text import shortened

AnyPath = str | os.PathLike[str]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MOST_WORKERS = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How values are rounded, and to which dtype."""

    out_dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    covariances: AnyPath | None = None
    """A file by which codes are chosen."""

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self.out_dtype is None else _DTYPES[self.out_dtype]

    def noise(self, name: str) -> Noise | None:
        return Noise(self.seed, name) if self.rounding == "stochastic" else None

    def check(self) -> None:
        if self.out_dtype is not None and self.out_dtype not in _DTYPES:
            raise ValueError(f"out_dtype is {self.out_dtype!r}; it must be None or one of {', '.join(_DTYPES)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {self.rounding!r}; it must be one of {', '.join(ROUNDINGS)}")


def merge_files(
    base_dir: AnyPath,
    adapter_dirs: AnyPath | Sequence[AnyPath],
    out_dir: AnyPath,
    options: MergeOptions,
    progress: Progress,
    adapter: str | None = None,
) -> MergeReport:
    """Write a merged checkpoint; see `lora_fx.merge_checkpoint`."""
    options.check()
    out = Path(out_dir)
    for path in (base_dir, out):
        try:
            check_path(path)
        except UnreadableError as error:
            raise MergeError(f"{shortened(os.fspath(path), LONGEST_NAME)}: {error}; nothing was written") from error
    base = read_checkpoint(Path(base_dir))
    _refuse_overlap(base.folder, out)
    check_folder(out)
    adapters = _read(adapter_dirs, adapter)
    covariances = None if options.covariances is None else read_covariances(options.covariances)
    plan = plan_merge(base, adapters, options.dtype, covariances)
    _refuse_noise(plan, options)
    _warn_of_narrowed(plan)
    known = {"covariances": None if covariances is None else size_and_time(covariances.file.path)}
    inputs = inputs_of(base, [adapter.files for adapter in adapters], asdict(options) | known)
    merge = _Merge(plan, out, options, open_journal(out, inputs), progress)
    merge.check_space()
    with _told(out), entered(out), _workers(covariances is not None) as number:
        merge.journal = open_journal(out, inputs)  # another merge may have been here since
        merge.run(number)
    return merge.report()


def _refuse_noise(plan: MergePlan, options: MergeOptions) -> None:
    coded = [(key, "is held as codes") for key, work in plan.works.items() if isinstance(work, CodeFold)]
    if coded and options.rounding != "nearest":
        raise MergeError(f"rounding='{options.rounding}' is for floats; nothing was written", coded)


def _warn_of_narrowed(plan: MergePlan) -> None:
    """Name what the merge writes more exactly than config.json lets it be read."""
    if plan.base.config and plan.out_dtype is None:
        entries = [(key, plan.base.find(key)) for key in plan.works]
        written = {key: where[1].dtype for key, where in entries if where is not None and where[1].dtype in FLOATS}
        written |= {addition.name: addition.entry.dtype for addition in plan.additions}
        warn_of_narrowed_file(plan.base.config, ((key, DTYPES[name]) for key, name in written.items()), 5)


def _refuse_overlap(base: Path, out: Path) -> None:
    """The result must lie apart from the base, which would be changed, or carried over with it."""
    a, b = base.resolve(), out.resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise MergeError(f"{out}: is the base itself, in it or around it; nothing was written")


def _read(folders: AnyPath | Sequence[AnyPath], adapter: str | None) -> list[AdapterFile]:
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    if not folders:
        raise MergeError("there is no adapter to merge")
    files = [file for folder in folders for file in _of_folder(folder, adapter)]
    places = Counter(file.folder.resolve() for file in files)
    twice = sorted(str(place) for place, number in places.items() if number > 1)
    if twice:
        raise MergeError("an adapter is given twice", [(place, "would be added twice") for place in twice])
    return files


def _of_folder(folder: AnyPath, adapter: str | None) -> list[AdapterFile]:
    """Return the adapters of a directory that are merged: all where each weight has one, or the one of the name."""
    files = {file.sites[0].lora.adapter: file for file in read_adapters(folder)}
    if adapter is not None:
        if adapter not in files:
            raise MergeError(f"{folder}: no adapter is called '{adapter}'; there are {', '.join(files)}")
        return [files[adapter]]
    holders: dict[str, set[str]] = {}
    for name, file in files.items():
        for site in file.sites:
            holders.setdefault(site.path, set()).add(name)
    several = [(path, ", ".join(sorted(names))) for path, names in holders.items() if len(names) > 1]
    if several:
        raise MergeError(f"{folder}: has several adapters for one weight", several, "name one: adapter=…, --adapter")
    return [*files.values()]


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """Say what is wrong with the disk; what is finished stays, and the merge can be continued."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        headline = "the disk is full" if full else f"cannot be finished: {error.strerror or error}"
        facts = [("file", str(error.filename))] if error.filename else []
        advice = f"{'make room and ' if full else ''}merge again with the same arguments: finished files are kept"
        raise MergeError(f"{out}: {headline}", facts, advice) from error


@contextlib.contextmanager
def _workers(alone: bool) -> Iterator[int]:
    """Give the number of workers: as many as torch uses threads, each of which then computes on one.

    Alone, one worker has all threads: what it holds of a weight grows with it, and is there once.
    """
    threads = torch.get_num_threads()
    if alone:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield max(1, min(_MOST_WORKERS, threads))
    finally:
        torch.set_num_threads(threads)


@dataclass(slots=True)
class _Merge:
    """One merge on its way."""

    plan: MergePlan
    out: Path
    options: MergeOptions
    journal: MergeJournal
    progress: Progress
    written: int = 0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = self._size(self.base.shards)

    def _size(self, names: Iterable[str]) -> int:
        return sum(out_shard(self.plan, name).size for name in names)

    @property
    def base(self) -> BaseCheckpoint:
        return self.plan.base

    def check_space(self) -> None:
        needed = self._size(self._todo()) + sum((self.base.folder / name).stat().st_size for name in self.base.carried)
        if is_read_only(self.out):
            raise MergeError(f"{self.out}: is on a file system that is mounted read-only; nothing was written")
        free = free_bytes(self.out)
        if needed > free:
            facts = [("needed", f"{needed:,} bytes"), ("free", f"{free:,} bytes")]
            raise MergeError(f"{self.out}: the disk has too little room; nothing was written", facts)

    def _todo(self) -> list[str]:
        return [name for name in self.base.shards if not self.journal.is_done(name)]

    def run(self, workers: int) -> None:
        """Write all files; the one that makes the directory a checkpoint comes last."""
        self.journal.write()
        for name in self.base.carried:
            carry(self.base.folder / name, place_in(self.out, name))
        self._write_shards(workers)
        if self.base.index is not None:
            self._write_json(self.base.index, _index(self.plan))
        self._refuse_changed()
        if self.base.config is not None:
            self._write_json(CONFIG, _config(self.plan, self.options))
        self.journal.close()

    def _refuse_changed(self) -> None:
        """Raise MergeError if files that were written are gone, or some of the base were replaced meanwhile.

        config.json would make a checkpoint of what is left, or of parts of both.
        """
        known: dict[str, list[int]] = self.journal.inputs["base"]
        others = [name for name, stat in known.items() if size_and_time(self.base.folder / name) != stat]
        if others:
            facts = [(name, "is another file than when the merge began") for name in others]
            advice = f"delete {self.out}, and merge again when nobody writes the base"
            raise MergeError(f"{self.out}: the base was changed while it was merged", facts, advice)
        names = (*self.base.carried, *self.base.shards, *filter(None, (self.base.index,)))
        lost = [(name, "was written, and is gone") for name in names if not place_in(self.out, name).exists()]
        if lost:
            advice = "see what deletes files there; merge again with the same arguments"
            raise MergeError(f"{self.out}: somebody has deleted files of the merge", lost, advice)

    def _write_json(self, name: str, changed: dict[str, Any] | None) -> None:
        if changed is None:
            carry(self.base.folder / name, self.out / name)
        else:
            write_whole(self.out / name, (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode())

    def _write_shards(self, number: int) -> None:
        """Write the shards; what is written is synced in a thread of its own, while the next is computed."""
        todo = self._todo()
        self._tell(self.total - self._size(todo), "")
        with Workers(number) as workers, Syncing() as syncing:
            for name in todo:
                shard = out_shard(self.plan, name)
                with _abandoned_on_error(OpenFiles(fresh_part_of(self.out / name))) as files:
                    sums = self._write_shard(shard, files, workers, syncing)
                    syncing.then(partial(self._finish, shard, files, sums))

    def _write_shard(self, shard: OutShard, files: OpenFiles, workers: Workers, syncing: Syncing) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}

        def note(job: Job, summed: Sums | None) -> None:
            if summed is not None:
                sums[job.name] = sums.get(job.name, Sums()) + summed
            syncing.note(files.target, job.size)
            self._tell(job.size, job.name)

        self._tell(len(shard.header or b""), "")
        workers.run(jobs(shard, files, self.options.noise), note)
        return sums

    def _finish(self, shard: OutShard, files: OpenFiles, sums: dict[str, Sums]) -> None:
        with _abandoned_on_error(files):
            files.target.sync()
        files.close()
        settle(part_of(self.out / shard.name), self.out / shard.name)
        self.journal.note(shard.name, shard.size, report_rows(shard, sums))

    def _tell(self, size: int, name: str) -> None:
        self.written += size
        self.progress(self.written, self.total, name)

    def report(self) -> MergeReport:
        return MergeReport(
            folder=str(self.out),
            tensors=tuple(self.journal.tensors()),
            untouched=sum(len(file.tensors) for file in self.base.shards.values()) - len(self.plan.works),
            carried=self.base.carried,
            left_out=self.base.left_out,
            untied=self.plan.untie,
        )


@contextlib.contextmanager
def _abandoned_on_error(files: OpenFiles) -> Iterator[OpenFiles]:
    """Close the files and delete the unfinished one: it may be what fills the disk."""
    try:
        yield files
    except BaseException:
        files.close()
        files.path.unlink(missing_ok=True)
        raise


# -- what changes in the JSON files


def _config(plan: MergePlan, options: MergeOptions) -> dict[str, Any] | None:
    """Return config.json as it must be now; None if it stays."""
    assert plan.base.config is not None
    config = tied.untied(plan.base.config) if plan.untie else plan.base.config
    if options.out_dtype is not None:
        config = _with_dtype(config, options.out_dtype)
    return None if config == plan.base.config else config


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the configuration with the dtype in which loaders are to take the weights, in its parts too."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in (*_DTYPES, "float64"):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def _index(plan: MergePlan) -> dict[str, Any] | None:
    """Return the index of the new files; None if it stays."""
    if not plan.additions and plan.out_dtype is None:
        return None
    assert plan.base.index is not None
    index = read_object(plan.base.folder / plan.base.index)
    shards = [out_shard(plan, name) for name in plan.base.shards]
    index["weight_map"] |= dict.fromkeys((addition.name for addition in plan.additions), shards[-1].name)
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = sum(shard.size - shard.data_start for shard in shards)
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(addition.entry.elements for addition in plan.additions)
    return index
