"""Training beside PEFT on the same base, from the same factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def losses_of_both(tuned: Any, theirs: Any, paths: Sequence[str], x: Tensor) -> list[list[float]]:
    """Return the losses of five steps of a model and of PEFT's, which gets its factors first, in place."""
    for path in paths:
        for factor in ("lora_A", "lora_B"):
            value = tuned.get_parameter(f"{path}.{factor}.default.weight")
            theirs.get_parameter(f"base_model.model.{path}.{factor}.default.weight").data.copy_(value.data)
    return [_losses(model, x) for model in (tuned, theirs)]


def _losses(model: Any, x: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], 1e-2)
    losses = []
    for step in range(5):
        loss = F.mse_loss(model(x + step / 8), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
