"""What was measured, and on which machine."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_fx.bench.subjects import FrozenBase, Subject
from lora_fx.capture.calls.objects import tensors_in
from lora_fx.graphdiff.render.text import folded
from lora_fx.models.dtypes import name_of_dtype
from lora_fx.models.samples import Sample
from lora_fx.tuned.report import RegionReport, Report, report

_CPUS = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Setting:
    """What was measured."""

    model: str
    rules: str
    sites: int
    in_graphs: int
    """How many of the sites a graph computes."""
    trainable: int
    dtype: str
    """Of the base's weights."""
    inputs: tuple[str, ...]
    tokens: int | None
    """Rows that the linears of a sequence model are called with; None for inputs that do not show it."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Where it was measured."""

    device: str
    processor: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str


def setting_of(base: FrozenBase, ours: Subject, rules: str, before: Report) -> Setting:
    """Return what was measured.

    Args:
        base: the frozen model and its inputs.
        ours: the adapted model.
        rules: their name.
        before: of the adapted model, from before it was measured.
    """
    inspected = report(ours.model)
    kinds = {weight.dtype for weight in base.model.parameters() if weight.is_floating_point()}
    sample = (base.sample.args, base.sample.kwargs)
    return Setting(
        model=type(base.model).__name__,
        rules=rules,
        sites=len(inspected.sites),
        in_graphs=sum(site.backend == "graph" for site in inspected.sites),
        trainable=inspected.trainable,
        dtype=", ".join(sorted(map(name_of_dtype, kinds))),
        inputs=tuple(f"{name_of_dtype(given.dtype)} {list(given.shape)}" for given in tensors_in(sample)),
        tokens=_tokens(base.sample),
        notes=tuple(_notes(before.regions, inspected.regions)),
    )


def _tokens(sample: Sample) -> int | None:
    first = next(tensors_in((sample.args, sample.kwargs)), None)
    if first is None:
        return None
    rows = first.shape[:-1] if first.is_floating_point() else first.shape
    return rows.numel() if len(rows) in (1, 2) else None


def _notes(before: Sequence[RegionReport], after: Sequence[RegionReport]) -> Iterator[str]:
    """Yield why graphs were not used although they are there: what was measured is not theirs then."""
    asides: dict[str, list[str]] = {}
    for first, last in zip(before, after, strict=True):
        for reason, number in last.misses.items():
            if number > first.misses.get(reason, 0):
                why = "; ".join([reason, *last.failures])
                asides.setdefault(why, []).append(last.path or "(root)")
    for why, paths in asides.items():
        yield f"graphs stood aside in {folded(paths)}: {why}"


def machine_of(model: nn.Module, threads: int) -> MachineFacts:
    """Return the facts of the machine that the model is on."""
    return MachineFacts(
        device=device_of(model).type,
        processor=_processor(device_of(model).type),
        cores=os.cpu_count() or 1,
        threads=threads,
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _processor(kind: str) -> str:
    """Return the name of a device of a type (`cpu`, `cuda`)."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    if kind != "cpu":
        return kind
    lines = _CPUS.read_text(encoding="utf-8").splitlines() if _CPUS.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))
