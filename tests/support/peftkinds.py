"""Models and rules for files of PEFT's: what layers of every kind are called there, and code that reads their weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

IDS = (torch.tensor([[1, 5, 7, 9], [3, 4, 2, 8]]),)


def gpt2() -> nn.Module:
    """Linears of class Conv1D, which store [in, out]; the head is tied to the embedding."""
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16, **special))


def mixtral() -> nn.Module:
    """Banks of experts, and a router that is a raw parameter."""
    sizes = {"hidden_size": 16, "intermediate_size": 12, "vocab_size": 50, "num_local_experts": 3}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def each(name: str, r: int = 2, **lora) -> dict:
    return {"match": {"name": name}, "lora": {"r": r, **lora}}


MIXED = {
    "version": 1,
    "rules": [each("pair.z"), each("experts.up", 5, alpha=3), each("first.w", 3, rslora=True), each("**", 3, alpha=7)],
}


class Loop(nn.Module):
    """One linear that is called three times, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(3):
            x = self.step(x).tanh()
        return self.out(x)

    inputs = (torch.randn(5, 8, generator=torch.Generator().manual_seed(3)),)


class Reader(nn.Module):
    """Reads the weight of a linear that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.lin.weight).tanh())

    inputs = Loop.inputs


class Gate(nn.Module):
    """A weight that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


class GateReader(nn.Module):
    """Reads the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = Gate(), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.gate.weight).tanh())

    inputs = Loop.inputs
