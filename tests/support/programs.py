"""What the targets that are programs of the whole model are tested with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import lora_fx
from tests.support.zoo import Encoder, randomise_

CLOSE = 1e-5
"""Of outputs of order one in float32: a few roundings of sums of some dozen terms."""
EFFECT = 1e-2
"""An adapter of these tests changes the output by at least so much."""
MIXED = {
    "version": 1,
    "rules": [
        {"match": {"name": "layer.0.**"}, "lora": {"r": 2, "alpha": 3, "dropout": 0.1}},
        {"match": {"name": "layer.1.**"}, "lora": {"r": 5, "alpha": 8, "rslora": True}},
        {"match": {"name": "layer.2.**"}, "lora": {"r": 3, "alpha": 12, "adapter": "top"}},
        {"match": {"name": "pooler.0"}, "lora": {"dora": True}},
    ],
    "train": ["classifier"],
}


def adapted(chosen: Mapping[str, Any], seed: int = 1) -> nn.Module:
    """Return an encoder with random adapters, and random values for what is trained whole."""
    torch.manual_seed(0)
    tuned = lora_fx.apply(Encoder().eval(), chosen, backend="modules")
    randomise_(tuned, seed)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            if parameter is tuned.classifier.weight:
                parameter.add_(0.1)
    return tuned.eval()
