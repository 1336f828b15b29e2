"""Tiny decoders with routed experts, run in any of the ways in which transformers runs experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_fx
from tests.support.kept import copy_of

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
FEW_CROSSED = pytest.mark.parametrize(
    ("implementation", "kind"),
    [
        ("eager", "mixtral"),
        ("grouped_mm", "mixtral"),
        pytest.param("batched_mm", "qwen", marks=pytest.mark.slow),
        pytest.param("eager", "qwen", marks=pytest.mark.slow),
    ],
)
"""Each way beside another kind of model, for tests that capture much."""
SIZES = {
    "hidden_size": 16, "vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def model(implementation: str, kind: str = "mixtral") -> nn.Module:
    torch.manual_seed(0)
    if kind == "mixtral":
        made: Any = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4))
    else:
        sizes = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))
    made.config._experts_implementation = implementation
    return made.eval()


def rules(*names: str, **lora: Any) -> dict[str, Any]:
    return {"rules": [{"match": {"name": list(names)}, "lora": {"r": 2, "init": "random", "alpha": 16, **lora}}]}


def adapted(implementation: str, first: dict[str, Any], kind: str) -> nn.Module:
    torch.manual_seed(1)
    return lora_fx.apply(model(implementation, kind), first, {"input_ids": IDS})


def two(implementation: str, first: dict[str, Any], second: dict[str, Any], kind: str = "mixtral") -> nn.Module:
    """Return a model with the adapters "a", by the first rules, and "b"."""
    tuned = copy_of(adapted, implementation, first, kind)
    lora_fx.rename(tuned, "default", "a")
    torch.manual_seed(2)
    lora_fx.add(tuned, second, adapter="b")
    return tuned
