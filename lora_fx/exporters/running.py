"""Run a client (`clients`) in a process of its own: a malformed file may kill it, and ours lives on."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.exporters.clients import Both, Call, outputs
from lora_fx.models.samples import Sample
from lora_fx.tuned.undo import disabled

T = TypeVar("T")
SECONDS = 1800
_START = """
import sys
sys.path.extend(path for path in {paths!r} if path not in sys.path)  # behind what Python itself needs
import torch
work = torch.load({work!r}, weights_only=False)  # our own parent process has written it
torch.save(work(), {result!r})
"""
"""What a client's process runs.  Libraries put folders on the path that hide modules of Python's own."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run_client(target: str, client: Callable[[], T], seconds: float = SECONDS) -> T:
    """Return what the client returns; it never looks for anything on the net.

    Args:
        target: for the texts of errors.
        client: whatever torch.save can pickle, a function with what it is given: `partial(clients.plain, ...)`; modules
            by their classes, which the client must be able to import.
        seconds: after which the client is killed.

    Raises:
        ExportError: the client failed, crashed, or ran out of time; shows its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        work, result = f"{folder}/work.pt", f"{folder}/result.pt"
        _save(target, client, work)
        try:
            ended = _run(work, result, seconds)
        except subprocess.TimeoutExpired as error:
            raise ExportError(target, f"the client gave no answer in {seconds} s") from error
        if ended.returncode:
            last_words = [(line,) for line in ended.stderr.strip().splitlines()[-5:]]
            raise ExportError(target, f"the client {_end(ended.returncode)}", last_words)
        returned: T = torch.load(result, weights_only=False)  # written by the client just now
        return returned


def _run(work: str, result: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _START.format(paths=sys.path, work=work, result=result)]
    return subprocess.run(command, env={**os.environ, **_OFFLINE}, capture_output=True, text=True, timeout=seconds)


def _save(target: str, client: Callable[[], object], path: str) -> None:
    try:
        torch.save(client, path)
    except Exception as error:
        raise ExportError(
            target,
            "the model cannot be handed to the client",
            [(type(error).__name__, str(error))],
            "define its class in a module that can be imported, or export without verify",
        ) from error


def _end(status: int) -> str:
    return f"failed with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"


def call_with(sample: Sample) -> Call:
    """Return a sample as clients take it."""
    return sample.args, sample.kwargs


def outputs_of(model: nn.Module, sample: Sample) -> list[Tensor]:
    """Return the floating point tensors that the model gives for the sample, in order, as float32."""
    return outputs(model, call_with(sample))


def without_and_with(tuned: nn.Module, computed: Callable[[], T]) -> tuple[T, T]:
    """Return what is computed without the model's adapters, and with them."""
    with disabled(tuned):
        base = computed()
    return base, computed()


def outputs_of_both(tuned: nn.Module, sample: Sample) -> Both:
    """Return what `outputs_of` gives without the adapters, and with them."""
    return without_and_with(tuned, lambda: outputs_of(tuned, sample))


def worst_difference(target: str, ours: Sequence[list[Tensor]], theirs: Sequence[list[Tensor]]) -> float:
    """Return max |Δ| of the outputs of several runs, ours against the client's."""
    return max(largest_difference(target, mine, other) for mine, other in zip(ours, theirs, strict=True))


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
