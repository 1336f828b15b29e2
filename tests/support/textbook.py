"""The GPT of the textbooks: separate query, key and value layers, as in Raschka's *Build a Large Language Model*."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            layer(x).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.W_query, self.W_key, self.W_value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.att, self.norm1, self.norm2 = Attention(width, heads, bias), nn.LayerNorm(width), nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class GPT(nn.Module):
    """A decoder with `outputs` outputs: the vocabulary, or the classes of a fine-tuned head."""

    def __init__(
        self, layers: int, width: int, heads: int, vocabulary: int, context: int, outputs: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.trf_blocks = nn.Sequential(*(Block(width, heads, bias) for _ in range(layers)))
        self.final_norm, self.out_head = nn.LayerNorm(width), nn.Linear(width, outputs, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1], device=idx.device))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


def gpt2_classifier() -> GPT:
    """GPT-2 124M with separate projections and a head for two classes."""
    return GPT(12, 768, 12, 50257, 1024, outputs=2, bias=True)


def gpt3() -> GPT:
    """The shape of GPT-3 175B (arXiv:2005.14165, table 2.1)."""
    return GPT(96, 12288, 96, 50257, 2048, outputs=50257)
