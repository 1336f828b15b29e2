"""Writers that are killed, or whose disk is full, read-only or gone: what lies there afterwards is old, new, or refused."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import lora_fx
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
from tests.support.killing import disturbed_before, fork
from tests.support.merging import factors, weight, write_adapter, write_base
from tests.support.zoo import Mlp, features

State = dict[str, str]
"""Of a path: the hash of each file's bytes, by its name; nothing where nothing is."""
TARGETS = ("merged", "peft", "vllm", "mlx", "kohya", "diffusers", "onnx", "gguf", "gguf_q4_0")
"""Of exports: those that take less than minutes.  The others end in the same step, which `tests/files/test_kills.py` kills."""
_OF_TARGETS = {
    "mlx": ("mlx", "transformers", "diffusers"),
    "diffusers": ("transformers", "diffusers"),
    "gguf": ("gguf", "transformers"),
    "gguf_q4_0": ("gguf", "transformers"),
}
"""Targets that write models of other libraries alone, with what making one needs."""
X = (features(2, 3),)


@dataclass(frozen=True, slots=True)
class Writer:
    """Something that writes to a path: its old and its new contents."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]
    resumes: bool = False
    """Whether what is unfinished may lie there, named as such; the next call ends it."""
    exact: bool = True
    """Whether equal contents are equal bytes; else files of equal names and sizes count as equal."""


def state_of(path: Path, exact: bool = True) -> State:
    """Return what a reader finds at a path, and beside it (onnx's adapters): hidden files are nobody's."""
    files = sorted(path.parent.rglob("*")) if path.parent.is_dir() else []
    names = {str(file.relative_to(path.parent)): file for file in files if file.is_file()}
    shown = {name: file for name, file in names.items() if not any(part.startswith(".") for part in Path(name).parts)}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if exact else str(file.stat().st_size)
        for name, file in shown.items()
    }


def leftovers(folder: Path) -> list[str]:
    """Return the hidden files and folders in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith("."))


def adapted(alpha: int, target: str = "") -> nn.Module:
    model, names = _model_for(target)
    rules = {"version": 1, "rules": [{"match": {"name": names}, "lora": {"r": 2, "alpha": alpha, "init": "random"}}]}
    torch.manual_seed(0)
    return lora_fx.apply(model, rules, backend="modules").eval()


def _model_for(target: str) -> tuple[nn.Module, str]:
    """Return a tiny model that a target can write, and the names of its adapted layers."""
    if target.startswith("gguf"):
        from tests.support.ggufbase import language_model

        return language_model("Llama"), "model.layers.0.**.{q,down}_proj"
    if target in _OF_TARGETS:
        from tests.support.peers import LLAMA, UNET

        return (LLAMA.build(), "**.q_proj") if target == "mlx" else (UNET.build(), "**.to_q")
    torch.manual_seed(0)
    return Mlp(), "fc*"


def writers(folder: Path, targets: tuple[str, ...] = TARGETS) -> dict[str, Writer]:
    """Return the writers by name: `save`, each target of export that is installed here, `merge_checkpoint` and others."""
    first, second = adapted(2), adapted(7)
    found = {"save": Writer(lambda path: lora_fx.save(first, path), lambda path: lora_fx.save(second, path))}
    for target in targets:
        if not all(map(importlib.util.find_spec, _OF_TARGETS.get(target, ()))):
            continue
        one = _exporter(adapted(2, target), target, folder), _exporter(adapted(7, target), target, folder)
        if (same := _is_exact(one[0], folder / target / "model")) is not None:
            found[f"export, {target}"] = Writer(*one, exact=same)
    data = [(features(rows, 4),) for rows in (2, 3)]
    found["input_covariances"] = Writer(
        lambda path: lora_fx.input_covariances(first, [*data, X], path),
        lambda path: lora_fx.input_covariances(second, data, path),
    )
    tensors = [{f"layers.{n}.fc.weight": weight(64, 96), f"layers.{n}.norm": weight(64)} for n in range(3)]
    adapter = {key: tensor for n in range(3) for key, tensor in factors(f"layers.{n}.fc", 64, 96).items()}
    base, given = write_base(folder / "base", *tensors), write_adapter(folder / "adapter", adapter)
    found["merge_checkpoint"] = Writer(
        lambda path: None, lambda path: lora_fx.merge_checkpoint(base, given, path), resumes=True
    )
    return found


def _exporter(tuned: nn.Module, target: str, folder: Path) -> Callable[[Path], object]:
    """Return what exports a model, to a target with what it needs beside it."""
    inputs: object = None if target in _OF_TARGETS else X
    options: dict[str, object] = {}
    if target == "gguf_q4_0":
        from tests.support.ggufbase import language_model, prompts, write_base

        write_base("Llama", language_model("Llama"), folder / "base.gguf")
        options = {"base": folder / "base.gguf", "data": [prompts(), prompts()]}
    return lambda path: lora_fx.export(tuned, path, target, inputs, **options)


def _is_exact(export: Callable[[Path], object], path: Path) -> bool | None:
    """Whether two exports are the same bytes; None where the target cannot write this model here."""
    states = []
    for _ in range(2):
        path.parent.mkdir()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                export(path)
        except lora_fx.ExportError:
            return None
        states.append(state_of(path))
        shutil.rmtree(path.parent)
    return states[0] == states[1]


# -- what comes of it


@dataclass(slots=True)
class Found:
    """What was there after a disaster, how often."""

    times: Counter[str] = field(default_factory=Counter)
    """`old`, `new`, `none`, `unfinished`, and what a call has answered: `refused`, `done`."""
    wrong: list[str] = field(default_factory=list)
    """What is torn and looks whole, what is lost, and what a call after it cannot put right."""


class Ground:
    """A place where a writer works: an old state before, and a judgement after."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.folder = Path(tempfile.mkdtemp(prefix="disaster"))
        self.folder.chmod(0o755)
        self.path = self.folder / "out" / "model"
        self.old = self._made(writer.old, "old")
        self.new = self._made(writer.new, "new")
        assert self.old != self.new, "nobody could tell them apart"
        self.found = Found()

    def _made(self, write: Callable[[Path], object], name: str) -> State:
        path = self.folder / name / "model"
        path.parent.mkdir()
        write(path)
        return state_of(path, self.writer.exact)

    def prepare(self) -> None:
        """Let the old state be there, and nothing else."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        shutil.copytree(self.folder / "old", self.path.parent)

    def judge(self, when: str, may_be_gone: bool = False) -> str:
        """Say what is there; note what ought not to be; and end it well."""
        now = state_of(self.path, self.writer.exact)
        name = "new" if now == self.new else "old" if now == self.old else "none" if self._is_none(now) else "torn"
        if name == "torn" and self.writer.resumes and "model/config.json" not in now:
            name = "unfinished"
        self.found.times[name] += 1
        if name == "torn":
            self.found.wrong.append(f"{when}: {sorted(now)}")
        if not (may_be_gone and not self.path.parent.exists()) and name != "new":
            self.path.parent.mkdir(exist_ok=True)
            self.writer.new(self.path)
            if state_of(self.path, self.writer.exact) != self.new:
                self.found.wrong.append(f"{when}: the next call does not put it right")
            if left := leftovers(self.path.parent):
                self.found.wrong.append(f"{when}: {left} stay")
        return name

    @staticmethod
    def _is_none(now: State) -> bool:
        """Whether readers find nothing: a folder with one of an adapter's two files is none."""
        return len(now) <= 1 and set(now) <= {f"model/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)}

    def close(self) -> Found:
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.found


def killed_at_random(writer: Writer, kills: int, seed: int = 0) -> Found:
    """Kill a writer with SIGKILL at so many random moments."""
    ground, chance = Ground(writer), random.Random(seed)
    ground.prepare()
    started = time.perf_counter()
    assert _in_child(lambda: writer.new(ground.path))[1] == 0, "the writer itself fails"
    seconds = time.perf_counter() - started
    done = 0
    while done < kills:
        ground.prepare()
        child = _started(lambda: writer.new(ground.path))
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        done += killed
        ground.judge(f"kill {done}")
    return ground.close()


def on_full_disk(writer: Writer, limits: int) -> Found:
    """Let no file grow beyond each of so many sizes, as a full disk does."""
    ground = Ground(writer)
    largest = max(file.stat().st_size for file in (ground.folder / "new").rglob("*") if file.is_file())
    for n in range(limits):
        ground.prepare()
        before = set(leftovers(ground.path.parent))
        answer = _answer(lambda n=n: _within(largest * n // limits, lambda: writer.new(ground.path)))  # type: ignore[misc]
        _note(ground, answer, f"{n}/{limits} of the size")
        if not writer.resumes and (left := set(leftovers(ground.path.parent)) - before):
            ground.found.wrong.append(f"{n}/{limits} of the size: {sorted(left)} stay")
        ground.judge(f"{n}/{limits} of the size")
    return ground.close()


def _within(size: int, work: Callable[[], object]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    work()


def read_only(writer: Writer) -> Found:
    """Let the folder be one that may not be written to."""
    ground = Ground(writer)
    ground.prepare()
    for path in (ground.path.parent, *ground.path.parent.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work() -> None:
        if os.geteuid() == 0:  # whom no permission stops
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        writer.new(ground.path)

    _note(ground, _answer(work), "read-only")
    if ground.found.times["done"]:
        ground.found.wrong.append("it was written to")
    for path in (ground.path.parent, *ground.path.parent.rglob("*")):
        path.chmod(0o755)
    ground.judge("read-only")
    return ground.close()


def vanishing(writer: Writer, every: int) -> Found:
    """Take the folder away before each of the writer's steps on the disk, or some of them."""
    ground = Ground(writer)
    step, answer = 0, ""
    while answer != "finished":
        ground.prepare()
        answer = disturbed_before(step, lambda: writer.new(ground.path), lambda: shutil.rmtree(ground.path.parent))
        if answer != "finished":
            _note(ground, answer, f"gone before step {step}")
            ground.judge(f"gone before step {step}", may_be_gone=True)
        step += every
    return ground.close()


def two_at_once(writer: Writer, times: int) -> Found:
    """Let two processes write to one place again and again, and read what is there all the time."""
    ground = Ground(writer)
    for n in range(times):
        ground.prepare()
        children = [_started(lambda w=w: w(ground.path)) for w in (writer.new, writer.new)]  # type: ignore[misc]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        ground.found.times["done"] += codes.count(0)
        ground.found.times["refused"] += codes.count(_REFUSED)
        if not {*codes} <= {0, _REFUSED} or 0 not in codes:
            ground.found.wrong.append(f"time {n}: ended with {codes}")
        if ground.judge(f"time {n}") != "new":
            ground.found.wrong.append(f"time {n}: lost")
    return ground.close()


_REFUSED, _FAILED = 3, 4


def _note(ground: Ground, answer: str, when: str) -> None:
    ground.found.times[answer if answer in ("done", "refused") else "failed"] += 1
    if answer not in ("done", "refused"):
        ground.found.wrong.append(f"{when}: {answer}")


def _answer(work: Callable[[], object]) -> str:
    told, code = _in_child(work)
    return {0: "done", _REFUSED: "refused"}.get(code, told or f"exit code {code}")


def _in_child(work: Callable[[], object]) -> tuple[str, int]:
    """Do some work in a process of its own; return what it said of a failure, and its exit code."""
    reading, writing = os.pipe()
    child = _started(work, writing)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    return text, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _started(work: Callable[[], object], told: int | None = None) -> int:
    child = fork()
    if child == 0:
        code = 0
        try:
            warnings.simplefilter("ignore")
            work()
        except lora_fx.LoraFxError:
            code = _REFUSED
        except BaseException as error:
            code = _FAILED
            if told is not None:
                os.write(told, repr(error).encode())
        os._exit(code)
    return child
