"""Kinds of sites in modules that hold several: attention, transformer layers, banks of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralModel, Qwen2MoeConfig, Qwen2MoeModel

from tests.support.sitekinds import Kind

_ALL = {"attention.in_proj_weight": "out_in", "attention.out_proj.weight": "out_in"}
_SEPARATE = {**{f"attention.{part}_proj_weight": "out_in" for part in "qkv"}, "attention.out_proj.weight": "out_in"}


class Attention(nn.Module):
    """nn.MultiheadAttention, called with these masks and switches."""

    def __init__(self, cross: bool, call: dict[str, Any], **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **settings)
        self.cross, self.call = cross, call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        call = {
            name: value.to(q.dtype) if isinstance(value, Tensor) and value.dtype != torch.bool else value
            for name, value in self.call.items()
        }
        return self.attention(q, k, v, **call) if self.cross else self.attention(q, q, q, **call)


def attention(
    name: str, cross: bool = False, call: dict[str, Any] | None = None, quick: bool = False, **settings: Any
) -> Kind:
    widths = (8, settings.get("kdim", 8), settings.get("vdim", 8))
    first = settings.get("batch_first", False)

    def inputs() -> tuple[Tensor, ...]:
        shapes = [(2, n, width) if first else (n, 2, width) for n, width in zip((3, 4, 4), widths, strict=True)]
        return tuple(torch.randn(shape) for shape in shapes)

    weights = _SEPARATE if widths != (8, 8, 8) else _ALL
    return Kind(name, lambda: Attention(cross, call or {}, **settings), inputs, weights, raw=True, quick=quick)


_PADDING = torch.tensor([[False, False, True], [False, False, False]])
_CAUSAL = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
_ADDED = torch.tensor([[0.0, -1.0, 0.5], [1.0, 0.0, -0.5], [0.0, 0.0, 0.0]])


class Single(nn.Module):
    """Without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


def encoder_layer(**settings: Any) -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **settings))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


_LAYER = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
_CROSS = ("multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight")


def _under(path: str, names: tuple[str, ...]) -> dict[str, str]:
    return {f"{path}.{name}": "out_in" for name in names}


def tokens() -> tuple[Tensor]:
    return (torch.randn(2, 4, 8),)


ATTENTION = [
    attention("self-attention"),
    attention("self-attention, batch first", batch_first=True),
    attention("self-attention, without weights", call={"need_weights": False}, batch_first=True, quick=True),
    attention("self-attention, each head's weights", call={"average_attn_weights": False}),
    attention("self-attention, padding", call={"key_padding_mask": _PADDING}, batch_first=True),
    attention("self-attention, mask", call={"attn_mask": _CAUSAL}),
    attention("self-attention, added mask", call={"attn_mask": _ADDED}),
    attention("self-attention, causal", call={"attn_mask": _CAUSAL, "is_causal": True, "need_weights": False}),
    attention("self-attention, both masks", call={"attn_mask": _CAUSAL, "key_padding_mask": _PADDING}, batch_first=True),
    attention("self-attention, no bias", bias=False),
    attention("self-attention, extra keys", add_bias_kv=True, add_zero_attn=True),
    attention("cross-attention", cross=True),
    attention("cross-attention, batch first", cross=True, batch_first=True, call={"need_weights": False}),
    attention("cross-attention, other widths", cross=True, kdim=6, vdim=10, quick=True),
    attention("cross-attention, other widths, batch first", cross=True, kdim=6, vdim=10, batch_first=True),
    Kind("self-attention without a batch", Single, lambda: (torch.randn(3, 8),), _ALL, raw=True, quick=False),
    Kind("encoder layer", encoder_layer, tokens, _under("0", _LAYER), raw=True, quick=False),
    Kind("encoder layer, batch first", lambda: encoder_layer(batch_first=True), tokens, _under("0", _LAYER), raw=True),
    Kind("encoder layer, norm first", lambda: encoder_layer(batch_first=True, norm_first=True, activation=F.gelu), tokens,
         _under("0", _LAYER), raw=True, quick=False),
    Kind("encoder layer, its linears alone", lambda: encoder_layer(batch_first=True), tokens, _under("0", _LAYER[2:]), fused=True),
    Kind("encoder", encoder, tokens, _under("layers.0", _LAYER) | _under("layers.1", _LAYER), raw=True, quick=False),
    Kind("decoder layer", lambda: nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
         lambda: (*tokens(), torch.randn(2, 5, 8)),
         dict.fromkeys((*_LAYER, *_CROSS), "out_in"), raw=True, quick=False),
]  # fmt: skip


class Experts(nn.Module):
    """A bank of experts; a loop over those that a token chose, as transformers writes it."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        up, down = ((3, 8, 6), (3, 6, 4)) if not transposed else ((3, 6, 8), (3, 4, 6))
        self.gate_up_proj = nn.Parameter(0.5 * torch.randn(up))
        self.down_proj = nn.Parameter(0.5 * torch.randn(down))
        self.transposed = transposed

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in choice.unique().tolist():
            chosen = (choice == expert).nonzero()[:, 0]
            gate, up = self.product(x[chosen], self.gate_up_proj[expert]).chunk(2, -1)
            y = self.product(F.silu(gate) * up, self.down_proj[expert])
            result = result.index_add(0, chosen, y.to(result.dtype))
        return result

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self.transposed else F.linear(x, weight)


class Mixture(nn.Module):
    """Every token meets one expert, by its number: which one does not depend on rounding."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        choice = torch.arange(x.shape[0]) % 2 * 2  # the expert in the middle gets none
        return x + self.experts(x, choice)


class Together(nn.Module):
    """All experts on all tokens, in two bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(3, -1, -1), self.up)
        return torch.bmm(F.gelu(hidden), self.down).mean(0)


_SMALL = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
          "max_position_embeddings": 32, "initializer_range": 0.3}  # fmt: skip


@functools.cache
def _mixtral(implementation: str) -> MixtralConfig:
    config = MixtralConfig(**_SMALL, intermediate_size=24, num_local_experts=4, num_experts_per_tok=4)
    config._experts_implementation = implementation
    return config


@functools.cache
def _qwen(implementation: str) -> Qwen2MoeConfig:
    config = Qwen2MoeConfig(**_SMALL, intermediate_size=24, moe_intermediate_size=16, shared_expert_intermediate_size=24,
                            num_experts=4, num_experts_per_tok=4)  # fmt: skip
    config._experts_implementation = implementation
    return config


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 19, (2, 6))}


def _real(name: str, make: Callable[[str], nn.Module], implementation: str) -> Kind:
    bank = {f"layers.0.mlp.experts.{name}": "bank out_in" for name in ("gate_up_proj", "down_proj")}
    return Kind(
        f"{name}, {implementation}",
        lambda: make(implementation),
        _ids,
        bank,
        raw=True,
        quick=False,
        double=implementation != "grouped_mm",
    )


BANKS = {"experts.gate_up_proj": "bank out_in", "experts.down_proj": "bank out_in"}
EXPERTS = [
    Kind("loop over experts", Mixture, lambda: (torch.randn(7, 6),), BANKS, raw=True),
    Kind("loop over experts, transposed", lambda: Mixture(transposed=True), lambda: (torch.randn(7, 6),),
         dict.fromkeys(BANKS, "bank in_out"), raw=True),
    Kind("all experts at once", Together, lambda: (torch.randn(5, 6),), {"up": "bank in_out", "down": "bank in_out"}, raw=True),
    *(
        _real(name, make, implementation)
        for name, make in (("Mixtral", lambda implementation: MixtralModel(_mixtral(implementation))), ("Qwen2-MoE", lambda implementation: Qwen2MoeModel(_qwen(implementation))))
        for implementation in ("eager", "batched_mm", "grouped_mm")
    ),
]  # fmt: skip
