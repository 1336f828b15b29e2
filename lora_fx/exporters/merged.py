"""merged: plain weights in safetensors; of models that have `save_pretrained`, the directory that it writes.

Quantised weights become plain ones: of the adapted layers, with the adapter folded into the dequantised weight, and of
all others too.
"""

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import MergeError
from lora_fx.exporters import clients
from lora_fx.exporters.running import call_with, largest_difference, outputs_of, run_client
from lora_fx.exporters.target import Refusal, Target, expressed, features
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.packed import dequantised_
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class
from lora_fx.passes.merge import check_mergeable
from lora_fx.tuned.undo import merged

WEIGHTS = "model.safetensors"
_PROGRAMS = "programs hold it: target='onnx', target='pt2'"


def refused(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what one plain weight cannot hold."""
    try:
        check_mergeable(tuned)
    except MergeError as error:
        invoked = {path for feature, path in features(tuned) if feature == "invocation"}
        for path, reason in error.problems:
            way_out = "PEFT reads it: target='peft'" if path in invoked else _PROGRAMS
            yield path, f"{reason}; {way_out}"


def write(tuned: nn.Module, path: Path) -> None:
    """Write the directory, or one file where the path ends in `.safetensors`."""
    model = dequantised_(merged(tuned, stays_plain=False))
    if _saves_itself(model, path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of generation settings that the base has too
            model.save_pretrained(path)  # type: ignore[operator]
    else:
        write_files({_file_in(path): canonical_safetensors(_tensors(model), {"format": "pt"})})


def _saves_itself(model: nn.Module, path: Path) -> bool:
    methods = ("save_pretrained", "from_pretrained")
    return path.suffix != ".safetensors" and all(callable(getattr(model, name, None)) for name in methods)


def _file_in(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / WEIGHTS


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with memory for every name: tied weights are written under all of theirs."""
    state: dict[str, Any] = model.state_dict()
    return {name: value.detach().cpu().contiguous().clone() for name, value in sorted(state.items())}


def verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    """Return max |Δ| of ours against `from_pretrained`, or against the plain model with the file in it."""
    model, call = dequantised_(merged(tuned, stays_plain=False)).eval(), call_with(sample)
    if _saves_itself(model, path):
        client = partial(clients.from_pretrained, original_class(model), path, call)
    else:
        client = partial(clients.plain, _emptied(model), _file_in(path), call)
    return largest_difference("merged", outputs_of(tuned, sample), run_client("merged", client))


def _emptied(model: nn.Module) -> nn.Module:
    """Return a copy in which every value that the file must bring is NaN."""
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for value in empty.state_dict().values():
            if value.is_floating_point():
                value.fill_(float("nan"))
    return empty


TARGET = Target(
    name="merged",
    writes="a directory, or one file",
    client="transformers, diffusers or torch",
    refused=refused,
    write=write,
    verify=verify,
    extra="export",
    several="in use",
    expresses=expressed({"calls", "invocation"}),
)
