"""Small models of transformers on padded sentences, adapted with rows left out and without, and one step of both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.kept import copy_of, kept

transformers = pytest.importorskip("transformers")
ENCODER = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64
}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
BATCH, LENGTH, PACKS = 4, 12, ("stack", "recompute", "liveness")


def padded(left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (BATCH, LENGTH), generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row in range(BATCH):
        mask[row, LENGTH - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask.flip(1) if left else mask}


@kept
def bert(head: str = "BertModel", **more: Any) -> nn.Module:
    torch.manual_seed(1)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**{**ENCODER, **off, **more})
    model: nn.Module = getattr(transformers, head)(config)
    return model.double()


@kept
def llama(head: str = "LlamaForCausalLM", **more: Any) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = getattr(transformers, head)(transformers.LlamaConfig(**{**DECODER, **more}))
    return model.double()


@kept
def in_float32(build: Any) -> nn.Module:
    return copy.deepcopy(build()).float()


def pair(model: nn.Module, inputs: Any, optimise: Any = PACKS, **more: Any) -> tuple[nn.Module, nn.Module]:
    """Return the adapted model so optimised and one without graphs, with the same adapters, B not 0, in train mode."""
    return copy_of(_pair, model, inputs, optimise, **more)


def _pair(model: nn.Module, inputs: Any, optimise: Any, **more: Any) -> tuple[nn.Module, nn.Module]:
    plan = lora_fx.plan(model, r=4, target="all-linear", example_inputs=inputs, **more)
    packs, plain = lora_fx.apply(model, plan, optimise=optimise), lora_fx.apply(model, plan, backend="modules")
    torch.manual_seed(2)
    for parameter in lora_fx.parameters(packs):
        nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(packs.state_dict())
    return packs.train(), plain.train()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    wanted = list(lora_fx.parameters(model))
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


def assert_same_step(packs: nn.Module, plain: nn.Module, loss_of: Any, **inputs: Any) -> None:
    """Hold one step of both against each other; the norms of a Llama round to float32, whatever its dtype."""
    tolerance = 1e-6 if "Llama" in type(plain).__name__ else 1e-12
    ours, theirs = loss_of(packs(**inputs)), loss_of(plain(**inputs))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients(packs, ours), gradients(plain, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))
