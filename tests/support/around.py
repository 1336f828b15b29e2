"""For the tests of what stands around a model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx

OF_OTHERS = ("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
"""PEFT's and transformers' own warnings."""
IN_FILES = [pytest.mark.usefixtures("no_graphs"), pytest.mark.filterwarnings(*OF_OTHERS)]
"""Marks for tests of files beside PEFT and transformers."""
STRICT_IN_FILES = [
    pytest.mark.usefixtures("no_graphs"),
    pytest.mark.filterwarnings(*OF_OTHERS, "error::lora_fx.errors.LoraFxWarning"),
]
"""The same where lora_fx itself must not warn."""
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
"""Results in float32 of a few short sums, near 1: some hundred roundings."""


def filled(tuned: nn.Module, scale: float = 0.3) -> nn.Module:
    """Return the adapted model itself, with values in all that it trains: the adapters have an effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return tuned


IDS = torch.tensor([[1, 5, 7, 9, 3]])


def llama(tied: bool = False) -> Any:
    """Return a tiny LlamaForCausalLM, the same at every call; transformers must be there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60, tie_word_embeddings=tied, initializer_range=0.3)).eval()


def logits(model: Any) -> Tensor:
    """Return what the model makes of `IDS`."""
    with torch.no_grad():
        return model(input_ids=IDS).logits
