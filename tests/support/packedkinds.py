"""Small models whose linears quantisation libraries hold as codes, and the numbers that these stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

bnb = pytest.importorskip("bitsandbytes")


class Block(nn.Module):
    """x + down(silu(up(norm(x))))."""

    def __init__(self, make: Callable[[int, int], nn.Module], width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), make(width, 2 * width), make(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def four_bit(kind: str, nested: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    def make(inner: int, out: int) -> nn.Module:
        layer = bnb.nn.Linear4bit(inner, out, bias, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
        return loaded(layer, dtype)

    return make


def eight_bit(bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return lambda inner, out: loaded(bnb.nn.Linear8bitLt(inner, out, bias, has_fp16_weights=False), dtype)


def loaded(layer: Any, dtype: torch.dtype) -> nn.Module:
    """Give a layer weights as a checkpoint would, and quantise them."""
    values = {"weight": torch.randn(layer.out_features, layer.in_features) / layer.in_features**0.5}
    if layer.bias is not None:
        values["bias"] = torch.randn(layer.out_features) / 8
    for name, value in values.items():
        getattr(layer, name).data = value.to(dtype)
    if hasattr(layer, "support_avx512bf16_for_cpu"):  # such a kernel rounds to bfloat16, and stops all gradients
        layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def numbers(layer: Any) -> Tensor:
    """Return what the codes of a layer stand for, by the library itself."""
    weight = layer._parameters["weight"]
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(weight.data, layer.state.SCB if weight.SCB is None else weight.SCB)


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "NF4": four_bit("nf4"),
    "NF4 with double quantisation": four_bit("nf4", nested=True, bias=True),
    "FP4": four_bit("fp4", bias=True),
    "int8": eight_bit(bias=True),
    "int8 without a bias": eight_bit(),
}


def model_of(kind: str) -> nn.Module:
    """Return two blocks of a kind, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(KINDS[kind]) for _ in range(2)))
