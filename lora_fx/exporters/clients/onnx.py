"""Runs a graph in onnxruntime without adapters, and with all of its adapter files."""

from __future__ import annotations

from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import Tensor


def work(given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs without adapters and with all."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a warning for each initializer that is an input, which is what we want
    session = onnxruntime.InferenceSession(given["graph"], options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in given["inputs"].items()}
    adapters = []
    for path in given["adapters"]:
        adapters.append(onnxruntime.LoraAdapter())
        adapters[-1].Load(path)
    return _outputs(session, feeds, []), _outputs(session, feeds, adapters)


def _outputs(session: Any, feeds: dict[str, Any], adapters: list[Any]) -> list[Tensor]:
    options = onnxruntime.RunOptions()
    for adapter in adapters:
        options.add_active_adapter(adapter)
    outputs = (torch.from_numpy(array) for array in session.run(None, feeds, options))
    return [tensor.float() for tensor in outputs if tensor.is_floating_point()]
