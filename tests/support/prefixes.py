"""Models whose upper layers alone are adapted, and training on rows that come again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.kept import copy_of, kept

transformers = pytest.importorskip("transformers")
UPPER = {"version": 1, "rules": [{"match": {"name": "**.{layers,layer}.{2..3}.**"}, "lora": {"r": 4, "alpha": 8}}]}
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
ROWS, LENGTH = 10, 12


@kept
def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {**SIZES, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, **more}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


@kept
def bert(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **off))


def data() -> dict[str, Tensor]:
    """Return rows with padding, as many as there are."""
    ids = torch.randint(1, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH - row % 4 for row in range(ROWS)])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def rows(chosen: Iterable[int]) -> dict[str, Tensor]:
    index = torch.tensor(list(chosen))
    return {name: value[index] for name, value in data().items()}


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    """Return an adapted model in train mode, always with the same adapters, B not 0."""
    return copy_of(_adapted, model, **settings)


def _adapted(model: nn.Module, **settings: Any) -> nn.Module:
    inputs = {name: value for name, value in rows(range(4)).items() if name != "labels"}
    tuned = lora_fx.apply(model, UPPER, inputs, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tuned.train()


def shuffled(epochs: int, batch: int = 4) -> list[list[int]]:
    """Return batches of rows, in another order in each epoch; the last one of an epoch is short."""
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(ROWS, generator=generator).tolist() for _ in range(epochs)]
    return [order[start : start + batch] for order in orders for start in range(0, ROWS, batch)]


def trained(tuned: nn.Module, batches: Iterable[list[int]]) -> list[Tensor]:
    """Return losses and gradients of all steps of training."""
    optimizer = torch.optim.SGD(lora_fx.parameters(tuned), 0.1)
    seen: list[Tensor] = []
    for batch in batches:
        loss = tuned(**rows(batch)).loss
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in lora_fx.parameters(tuned))]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Block(nn.Module):
    """A block with any forward, of (self, x, *others)."""

    def __init__(self, body: Callable[..., Any] | None = None, **parts: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, *others: Any) -> Any:
        return torch.tanh(self.linear(x)) if self.body is None else self.body(self, x, *others)


class Stack(nn.Module):
    """Blocks one after the other; `between` is done to what each gives."""

    def __init__(self, blocks: Iterable[nn.Module], between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *others)
            x = x[0] if isinstance(x, tuple) else x
            x = x if self.between is None else self.between(x)
        return self.head(x)


def stacked(*bodies: Any, between: Callable[[Tensor], Tensor] | None = None, **parts: nn.Module) -> nn.Module:
    """Return a stack of blocks with these forwards, the last of which, a plain one, is adapted."""
    torch.manual_seed(0)
    stack = Stack([*(Block(body, **parts) for body in bodies), Block()], between)
    last = f"blocks.{len(bodies)}.linear"
    return lora_fx.apply(stack, {"version": 1, "rules": [{"match": {"name": last}, "lora": {"r": 2, "alpha": 4}}]})
