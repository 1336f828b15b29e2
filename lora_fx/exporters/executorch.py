"""executorch: one .pte file with two methods, `forward` with the adapters and `base` without; they share their weights.

A program of ExecuTorch plans its memory beforehand: it takes inputs of the example's sizes, and smaller ones.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.exporters import clients
from lora_fx.exporters.base_graph import base_graph_parts
from lora_fx.exporters.program import (
    EVERY_FEATURE,
    converting,
    exported,
    input_tensors,
    plain_outputs_of_both,
    refused_by_programs,
)
from lora_fx.exporters.running import run_client, worst_difference
from lora_fx.exporters.target import Target
from lora_fx.models.samples import Sample
from lora_fx.tuned.undo import removed


def _write(tuned: nn.Module, path: Path, sample: Sample) -> None:
    models = {"forward": base_graph_parts(tuned).model, "base": removed(tuned).eval().requires_grad_(False)}
    programs = {name: exported("executorch", model, sample, bounded=True) for name, model in models.items()}
    exir: Any = importlib.import_module("executorch.exir")
    with torch.no_grad(), converting("executorch", "ExecuTorch cannot convert the model"):
        content = bytes(exir.to_edge(programs).to_executorch().buffer)
    path.write_bytes(content)


def _verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    client = partial(clients.executorch, path, list(input_tensors(tuned, sample).values()))
    return worst_difference("executorch", plain_outputs_of_both(tuned, sample), run_client("executorch", client))


TARGET = Target(
    name="executorch",
    writes="one `.pte` file with the methods `forward` (adapted) and `base`",
    client="ExecuTorch",
    refused=refused_by_programs,
    write=_write,
    verify=_verify,
    extra="executorch",
    needs=("executorch",),
    needs_sample=True,
    several="used",
    expresses={**EVERY_FEATURE, "adapters": "exact equivalent"},
)
