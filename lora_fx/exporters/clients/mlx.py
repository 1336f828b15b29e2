"""Loads a model of transformers and an adapter in mlx-lm, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def work(given: dict[str, Any]) -> dict[str, Tensor]:
    """Return the logits with the adapter and before it was loaded."""
    import mlx.core as mx
    import numpy
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(given["base"]))
    ids = mx.array(given["ids"].numpy())

    def logits() -> Tensor:
        return torch.from_numpy(numpy.array(model(ids).astype(mx.float32)))

    base = logits()
    load_adapters(model, given["adapter"])
    model.eval()
    return {"base": base, "adapted": logits()}
