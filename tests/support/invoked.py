"""A small causal language model whose adapter acts from an invocation on, here and in PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.kept import copy_of

pytest.importorskip("transformers")

import transformers

INVOCATION = [7, 5, 9]
NAMES = "**.{q,v,o,gate,down}_proj"
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
STARTS = [3, 7, None, 9]
"""Where the adapter begins to act in the rows of `prompts`."""


def llama(**settings: Any) -> Any:
    """Return a model with untied weights, in eval mode."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | settings)).eval()


def prompts() -> Tensor:
    """Return rows with the invocation once, twice, never, and at the end: [4, 12]."""
    ids = torch.randint(10, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    for row, places in enumerate(((3,), (1, 7), (), (9,))):
        for place in places:
            ids[row, place : place + 3] = torch.tensor(INVOCATION)
    return ids


def left_padded() -> dict[str, Tensor]:
    """Return prompts of several lengths, padded on the left."""
    ids, mask = prompts(), torch.ones(4, 12, dtype=torch.long)
    for row, padding in enumerate((0, 1, 4, 6)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def rules(invocation: list[int] | None = INVOCATION, name: str = NAMES, **more: Any) -> dict[str, Any]:
    lora = {"r": 4, "alpha": 32, "init": "random", **more} | ({"invocation": invocation} if invocation else {})
    return {"version": 1, "rules": [{"match": {"name": name}, "lora": lora}]}


def invoked(inputs: Any = None, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Return the model with the adapter "default"; with inputs, as graphs, which copies of `llama()` share."""
    return copy_of(_invoked, inputs, **options) if model is None else _invoked(inputs, model, **options)


def _invoked(inputs: Any, model: nn.Module | None = None, **options: Any) -> nn.Module:
    base = llama() if model is None else model
    torch.manual_seed(1)
    return lora_fx.apply(base, rules(), inputs, backend="auto" if inputs else "modules", **options)


def in_peft(model: nn.Module, name: str = "default", invocation: list[int] | None = INVOCATION, **settings: Any) -> Any:
    """Return a copy of the model in PEFT, with values in its adapter."""
    import copy

    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False,
        alora_invocation_tokens=invocation, **settings,
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name).eval()


def pair(inputs: Any = None) -> tuple[nn.Module, Any]:
    """Return a model of ours, which came from PEFT, and PEFT's: with the same values."""
    return copy_of(_pair, inputs)


def _pair(inputs: Any) -> tuple[nn.Module, Any]:
    theirs = in_peft(llama())
    return lora_fx.from_peft(theirs, inputs), theirs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the factors, by path and factor."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.grad is not None:
            found[name.removeprefix("base_model.model.")] = parameter.grad.clone()
    return found


def logits(model: nn.Module, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(given or {"input_ids": prompts()})).logits


def two(inputs: Any = None) -> nn.Module:
    """Return a model with "default", which acts from its invocation on, "plain", and "other" with another one."""
    return copy_of(_two, inputs)


def _two(inputs: Any) -> nn.Module:
    tuned = invoked(inputs)
    for name, tokens in (("plain", None), ("other", prompts()[2, 4:6].tolist())):
        torch.manual_seed(len(name))
        lora_fx.add(tuned, rules(tokens), adapter=name)
    return tuned
