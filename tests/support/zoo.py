"""A small zoo: tiny models, each with one difficulty, and inputs of any size for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.models.samples import Sample

VOCABULARY = 50


def tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * batch + length)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def features(batch: int, length: int, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(100 * batch + length)
    return torch.randn(batch, length, width, generator=generator)


class Mlp(nn.Module):
    """No blocks: the root itself is the region."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 32)
        self.fc2 = nn.Linear(32, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Separate projections, an additive mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)
        self.heads = heads
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shape = (*x.shape[:-1], self.heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask
        y = self.dropout(scores.softmax(-1)) @ v
        return self.dense(y.transpose(1, 2).reshape(x.shape))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.norm1(hidden + self.attention(hidden, mask))
        inner = F.gelu(self.intermediate(hidden))
        return self.norm2(hidden + self.output(inner)), inner


class Encoder(nn.Module):
    """BERT-type: tuples from layers, an optional padding mask, a pooler and a classifier outside of the blocks."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, width)
        self.layer = nn.ModuleList(EncoderLayer(width, 4) for _ in range(layers))
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.classifier = nn.Linear(width, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embeddings(input_ids)
        mask = None if attention_mask is None else (1.0 - attention_mask[:, None, None, :]) * -1e9
        for layer in self.layer:
            hidden, _ = layer(hidden, mask=mask)
        return self.classifier(self.pooler(hidden[:, 0]))


class GptBlock(nn.Module):
    """Fused qkv, causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.width = heads, width

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(self.width, dim=2)
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    """GPT-2-type: fused qkv, positions, and a head tied to the token embedding."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.h = nn.ModuleList(GptBlock(width, 4) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class MixerBlock(nn.Module):
    """Straight-line code: torch.fx can trace it without inputs."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token1, self.token2 = nn.Linear(tokens, 2 * tokens), nn.Linear(2 * tokens, tokens)
        self.channel1, self.channel2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).transpose(1, 2)
        x = x + self.token2(F.gelu(self.token1(y))).transpose(1, 2)
        return x + self.channel2(F.gelu(self.channel1(self.norm2(x))))


class Mixer(nn.Module):
    """MLP-mixer: a fixed number of tokens."""

    def __init__(self, tokens: int = 6, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(MixerBlock(tokens, width) for _ in range(2)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


class ValueBranch(nn.Module):
    """Cannot be captured: which branch runs depends on values."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else self.second(x)


class Branching(nn.Module):
    """Blocks of which the second half cannot be captured; the first half becomes a region of its own."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mlp, self.branch = Mlp(width), ValueBranch(width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(self.mlp(x))

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Shared(nn.Module):
    """One module object under two names, and called twice."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = self.a
        self.c = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class ModeDependent(nn.Module):
    """Another graph in train mode, though nothing is random at p = 0."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(width) for _ in range(2))
        self.p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + F.dropout(block(x), self.p, self.training)
        return x


class WeightReader(nn.Module):
    """Uses a child's weight without calling the child."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(F.linear(x, self.project.weight, self.project.bias)))


class WithNorm(nn.Module):
    """Running statistics, which training changes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.fc(x).mean(1)))


def encoder_stack() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@dataclass(frozen=True)
class Specimen:
    """A model and how to call it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]
    rule: str = "**"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def sample(self, batch: int = 2, length: int = 6) -> Sample:
        args, kwargs = self.inputs(batch, length)
        return lora_fx.call(*args, **kwargs)


def _features(batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (features(batch, length),), {}


def _fixed(batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (features(batch, 6),), {}


def _tokens(batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (tokens(batch, length),), {}


def _masked(batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.ones(batch, length)
    mask[-1, -2:] = 0
    return (), {"input_ids": tokens(batch, length), "attention_mask": mask}


ZOO = (
    Specimen("mlp", Mlp, _features),
    Specimen("encoder", Encoder, _masked),
    Specimen("encoder-no-mask", Encoder, _tokens),
    Specimen("gpt", Gpt, _tokens),
    Specimen("mixer", Mixer, _fixed),
    Specimen("nn.TransformerEncoder", encoder_stack, _features, "**.{linear1,linear2}"),
    Specimen("value-branch", ValueBranch, _features),
    Specimen("branching", Branching, _features),
    Specimen("shared", Shared, _features),
    Specimen("mode-dependent", ModeDependent, _features),
    Specimen("weight-reader", WeightReader, _features),
)
SHAPES = ((2, 6), (3, 9), (1, 6), (4, 1), (5, 7))


def rules(name: str | list[str] = "**", train: list[str] | None = None, **lora: Any) -> dict[str, Any]:
    """Return rules with one rule; for all linears if no name is given."""
    match = {"name": name, "op": "linear"} if name == "**" else {"name": name}
    content: dict[str, Any] = {"version": 1, "rules": [{"match": match, "lora": {"r": 4, **lora}}]}
    return content | ({"train": train} if train else {})


def randomise_(tuned: nn.Module, seed: int = 1) -> None:
    """Give every adapter parameter random values, the same for the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(tuned.named_parameters()):
            if ".lora_" in f".{name}":
                scale = 1.0 if "magnitude" in name else 0.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
                parameter.copy_(scale * parameter + noise.to(parameter.dtype))


def call_encoder(batch: int = 2, length: int = 6) -> Sample:
    args, kwargs = _masked(batch, length)
    return lora_fx.call(*args, **kwargs)
