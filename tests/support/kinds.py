"""Small models, one for each kind of weight that is no plain linear, and what compares two of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from tests.support.zoo import VOCABULARY, randomise_

OUTPUT = 1e-5
"""Largest difference of two outputs in float32, relative to the largest output: a few roundings of sums of 100 terms."""
EFFECT = 1e-2
"""An adapter of these tests moves the output by at least so much, relative to it: 1,000 times `OUTPUT`."""


class Convolutions(nn.Module):
    """Convolutions over one, two and three dimensions, with stride and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, padding=1)
        self.plane = nn.Conv2d(2, 8, (3, 2), stride=2, padding=1)
        self.space = nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0), bias=False)
        self.out = nn.Linear(6 + 8 + 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        line = self.line(x.view(-1, 4, 36)).mean(-1)
        plane = self.plane(x.view(-1, 2, 6, 12)).mean((-1, -2))
        space = self.space(x.view(-1, 2, 3, 4, 6)).mean((-1, -2, -3))
        return self.out(torch.cat([line, plane, space], -1).tanh())

    inputs = (torch.randn(3, 144, generator=torch.Generator().manual_seed(3)),)


class Padded(nn.Module):
    """A convolution whose padding is not of zeros, or whose kernel has holes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh()

    inputs = (torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(3)),)


class Tokens(nn.Module):
    """An embedding, with a row for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(VOCABULARY, 12, padding_idx=0), nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids).tanh())

    inputs = (torch.tensor([[1, 5, 0, 7], [49, 5, 5, 0]]),)


class Product(nn.Module):
    """x @ w, with w as [in, out]."""

    def __init__(self, inputs: int = 8, outputs: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(inputs, outputs) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Experts(nn.Module):
    """Two banks of matrices, [bank, out, in] each, of which one mixes the experts' answers."""

    def __init__(self, number: int = 4, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(number, inner, width) * 0.3)
        self.down = nn.Parameter(torch.randn(number, width, inner) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        by_expert = torch.einsum("bi,eoi->ebo", x, self.up).tanh()
        return torch.einsum("ebi,eoi->bo", by_expert, self.down)


class Stored(nn.Module):
    """A bank of square matrices that are stored [bank, in, out], and used so: x @ w[e]."""

    def __init__(self, number: int = 3, width: int = 8) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(number, width, width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.expand(self.bank.shape[0], -1, -1), self.bank).sum(0)


class Matrices(nn.Module):
    """Raw parameters: two matrices on one module, a third on another, banks of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.experts, self.stored = Product(8, 8), Pair(), Experts(), Stored()

    def forward(self, x: Tensor) -> Tensor:
        return self.stored(self.experts(self.pair(self.first(x).tanh()).tanh()).tanh())

    inputs = (torch.randn(5, 8, generator=torch.Generator().manual_seed(3)),)


class Pair(nn.Module):
    """Two raw matrices on one module, registered in another order than that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(6, 8) * 0.3)
        self.a = nn.Parameter(torch.randn(6, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.z).tanh() @ self.a


class Attention(nn.Module):
    """torch's own attention."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mha(x, x, x, need_weights=False)[0])

    inputs = (torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3)),)


def built(kind: Any, **settings: Any) -> nn.Module:
    """Return a model of that class in eval mode, always with the same values."""
    torch.manual_seed(0)
    model: nn.Module = kind(**settings).eval()
    return model


def computed(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Return the output, or the logits in it."""
    with torch.no_grad():
        result = model(*inputs)
    return getattr(result, "logits", result)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def jitter_(model: nn.Module) -> None:
    """Move every parameter that is trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def in_peft(base: nn.Module, folder: Path, **config: Any) -> nn.Module:
    """Return PEFT's adapted copy of a model, with random values, and save its adapter."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    jitter_(theirs)
    theirs.save_pretrained(folder)
    return theirs.eval()


def in_ours(base: nn.Module, folder: Path, rules: Any, inputs: tuple[Any, ...]) -> nn.Module:
    """Return the adapted twin of a model, with random values, and save its adapter."""
    ours = lora_fx.apply(base, rules, lora_fx.call(*inputs), backend="modules").eval()
    randomise_(ours)
    with torch.no_grad():
        for parameter in lora_fx.parameters(ours):
            parameter.mul_(3)
    lora_fx.save(ours, folder)
    return ours


def from_file_in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """Return PEFT's adapted copy of a model, with the adapter of a directory."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
