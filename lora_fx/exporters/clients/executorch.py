"""Runs both methods of a program in ExecuTorch's portable runtime."""

from __future__ import annotations

from typing import Any

from executorch.runtime import Runtime  # type: ignore[import-untyped]
from torch import Tensor

from lora_fx.exporters.clients.job import tensors


def work(given: dict[str, Any]) -> list[list[Tensor]]:
    """Return the outputs of `forward` and of `base`."""
    program = Runtime.get().load_program(given["program"])
    return [_outputs(program, name, given["inputs"]) for name in ("forward", "base")]


def _outputs(program: Any, name: str, inputs: list[Tensor]) -> list[Tensor]:
    # what comes back lies in the program's own memory, which the next call uses again
    return [tensor.clone() for tensor in tensors(program.load_method(name).execute(inputs))]
