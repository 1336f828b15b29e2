"""What the tests of exports share: an adapted model for each feature that targets differ in, and a client that dies."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.models.samples import Sample
from tests.support import kinds
from tests.support.zoo import Mlp, features, randomise_

X = (features(2, 6),)


class Linear1d(nn.Module):
    """GPT-2's linear, whose weight is [in, out]."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.fused, self.out = Conv1D(12, 16), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fused(x).tanh())


class Twice(nn.Module):
    """A linear that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.out = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.again(x).tanh()).tanh())


class Fused(nn.Module):
    """Queries, keys and values in one weight, beside a plain linear."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.qkv(x).tanh())


def rule(name: str, *, slices: Any = None, match: Any = None, **lora: Any) -> dict[str, Any]:
    extra = {"per_call": True} if lora.pop("per_call", False) else {}
    rule = {"match": {"name": name, **(match or {})}, "lora": {"r": 3, "alpha": 5, **lora}, **extra}
    return rule | ({"slices": slices} if slices else {})


def written(*given: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"version": 1, "rules": list(given), **top}


def tuned_of(model: nn.Module, chosen: Any, inputs: tuple[Any, ...] | None, backend: Any = "modules") -> nn.Module:
    """Return an adapted model with random values in all that is trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks that are as large as the tiny layers
        tuned = lora_fx.apply(model, chosen, None if inputs is None else lora_fx.call(*inputs), backend).eval()
    randomise_(tuned)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.mul_(1.0 + 0.1 * torch.rand(parameter.shape, generator=generator))
            if parameter.dim() == 1 and not bool(parameter.any()):
                parameter.add_(0.1)
    return tuned


def _mlp(first: dict[str, Any], second: dict[str, Any] | None = None, **more: Any) -> tuple[nn.Module, Any, Any]:
    return kinds.built(Mlp), written(first, *([second] if second else []), **more), X


def _of(kind: Any, chosen: Any) -> tuple[nn.Module, Any, Any]:
    return kinds.built(kind), chosen, kind.inputs


def _invoked() -> tuple[nn.Module, Any, Any]:
    from tests.support import invoked  # skips what asks for it where transformers is not installed

    return invoked.llama(), written(rule("**.q_proj", invocation=invoked.INVOCATION)), (invoked.prompts(),)


_ROWS = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
FEATURES: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "linear": lambda: _mlp(rule("fc*")),
    "conv1d": lambda: (kinds.built(Linear1d), written(rule("fused")), X),
    "convolution": lambda: _of(kinds.Convolutions, written(rule("{line,plane,space}"))),
    "embedding": lambda: _of(kinds.Tokens, written(rule("words"))),
    "attention": lambda: _of(kinds.Attention, written(rule("mha.in_proj_weight"))),
    "parameter": lambda: (nn.Sequential(kinds.built(kinds.Product)), written(rule("0.w")), (_ROWS,)),
    "experts": lambda: (nn.Sequential(kinds.built(kinds.Experts)), written(rule("0.{up,down}")), (_ROWS,)),
    "slices": lambda: (
        kinds.built(Fused),
        written(rule("qkv", slices={"of": ["q", "k", "v"], "adapt": ["q", "v"]})),
        X,
    ),
    "calls": lambda: (kinds.built(Twice), written(rule("again", per_call=True)), X),
    "ranks": lambda: _mlp(rule("fc1", r=2, alpha=2), rule("fc2", r=4, alpha=4)),
    "alphas": lambda: _mlp(rule("fc1", alpha=4), rule("fc2", alpha=9)),
    "rslora": lambda: _mlp(rule("fc*", rslora=True)),
    "dora": lambda: _mlp(rule("fc*", dora=True)),
    "bias": lambda: _mlp(rule("fc*", bias=True)),
    "invocation": lambda: _invoked(),
    "train": lambda: _mlp(rule("fc1"), train=["fc2"]),
    "tokens": lambda: _of(kinds.Tokens, written(rule("out"), tokens=[{"name": "words", "ids": [1, 2]}])),
    "adapters": lambda: _mlp(rule("fc1"), rule("fc2", adapter="second")),
}
"""For each feature, a model, rules that adapt it and nothing but it, and inputs."""


@functools.cache
def specimen(feature: str) -> tuple[nn.Module, Sample]:
    """Return an adapted model that has the feature, and a sample of inputs."""
    model, chosen, inputs = FEATURES[feature]()
    return tuned_of(model, chosen, inputs), lora_fx.call(*inputs)


def dies() -> None:
    """Die as a client dies of a malformed file."""
    os.abort()
