"""Run a client in a process of its own: a malformed file may kill it, and ours lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.exporters.clients.job import GIVEN, RESULT, outputs
from lora_fx.models.samples import Sample

SECONDS = 1800
_START = """
import importlib, sys
sys.path.extend(path for path in {paths!r} if path not in sys.path)  # behind what Python itself needs
from lora_fx.exporters.clients import job
job.run(importlib.import_module({client!r}).work)
"""
"""What a client's process runs.  Libraries put folders on the path that hide modules of Python's own."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run_client(target: str, client: str, given: dict[str, Any], seconds: float = SECONDS) -> Any:
    """Return what the client's `work(given)` returns; it never looks for anything on the net.

    Args:
        target: for the texts of errors.
        client: a module with a function `work`, by its name: `lora_fx.exporters.clients.peft`.
        given: whatever torch.save can pickle; modules by their classes, which the client must be able to import.
        seconds: after which the client is killed.

    Raises:
        ExportError: the client failed, crashed, or ran out of time; shows its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        _save(target, given, Path(folder) / GIVEN)
        environment = {**os.environ, **_OFFLINE}
        command = [sys.executable, "-c", _START.format(client=client, paths=sys.path), folder]
        try:
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise ExportError(target, f"the client gave no answer in {seconds} s") from error
        if ended.returncode:
            raise ExportError(target, f"the client {_end(ended.returncode)}", _last_words(ended.stderr))
        return torch.load(Path(folder) / RESULT, weights_only=False)  # written by the client just now


def _save(target: str, given: dict[str, Any], path: Path) -> None:
    try:
        torch.save(given, path)
    except Exception as error:
        raise ExportError(
            target,
            "the model cannot be handed to the client",
            [(type(error).__name__, str(error))],
            "define its class in a module that can be imported, or export without verify",
        ) from error


def _end(status: int) -> str:
    return f"failed with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"


def _last_words(text: str) -> list[tuple[str]]:
    return [(line,) for line in text.strip().splitlines()[-5:]]


def given_sample(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a sample as clients take it."""
    return sample.args, sample.kwargs


def outputs_of(model: nn.Module, sample: Sample) -> list[Tensor]:
    """Return the floating point tensors that the model gives for the sample, in order, as float32."""
    return outputs(model, given_sample(sample))


def largest_difference(target: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return max |Δ| of two lists of outputs; NaN anywhere gives infinity.

    Raises:
        ExportError: the numbers or shapes of the tensors differ.
    """
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        shapes = [("here", str([list(tensor.shape) for tensor in ours]))]
        shapes += [("in the client", str([list(tensor.shape) for tensor in theirs]))]
        raise ExportError(target, "the client gives outputs of other shapes", shapes)
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.numel():
            gap = float((mine.double() - other.double()).abs().nan_to_num(nan=float("inf")).max())
            worst = max(worst, gap)
    return worst
