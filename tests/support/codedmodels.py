"""Small models that compressed-tensors, hqq and quanto hold as codes, and the plain models that they compute as."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
PATHS = [f"{block}.{name}" for block in (0, 1) for name in ("up", "down")]


class Block(nn.Module):
    """x + down(silu(up(norm(x))))."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def plain() -> nn.Module:
    """Return two blocks, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> Callable[[], nn.Module]:
    """Return what makes a model as transformers loads it: codes, and a hook that decompresses them at the first call."""

    def make() -> nn.Module:
        compressors = pytest.importorskip("compressed_tensors.compressors")
        compress_(model := plain(), weights, inputs)
        compressors.ModelCompressor().compress_model(model)
        return model

    return make


def compress_(model: nn.Module, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> None:
    """Give the linears of a model scales by their largest weights, in place; they are not compressed yet."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    helpers = importlib.import_module("compressed_tensors.quantization.utils")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = quantization.QuantizationConfig(config_groups={"all": group}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config, show_progress=False)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and hasattr(layer, "quantization_scheme"):
            settings, whole = layer.quantization_scheme.weights, None
            values = layer.weight.detach()
            if settings.strategy == "tensor_group":
                whole = helpers.generate_gparam(values.amin(), values.amax())
                layer.weight_global_scale.data.copy_(whole)
            if hasattr(layer, "input_global_scale"):
                layer.input_global_scale.data.copy_(helpers.generate_gparam(torch.tensor(-4.0), torch.tensor(4.0)))
            if settings.strategy in ("group", "tensor_group"):
                values = values.unflatten(1, (-1, settings.group_size))
            found = helpers.calculate_qparams(values.amin(-1), values.amax(-1), settings, global_scale=whole)
            for name, value in zip(("weight_scale", "weight_zero_point"), found, strict=True):
                old = getattr(layer, name)
                old.data.copy_(value.view_as(old))


def hqq(bits: int, axis: int = 1) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("hqq.core.quantize")
        model = plain()
        for path in PATHS:
            settings = library.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
            layer = model.get_submodule(path)
            model.set_submodule(path, library.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu"))
        return model

    return make


def quanto(weights: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("optimum.quanto")
        model = plain()
        library.quantize(model, weights=getattr(library, weights))
        if (
            weights == "qint4"
        ):  # what unpacks four bits is compiled at the first call; this is the library's own way in Python
            extension = importlib.import_module("optimum.quanto.library.extensions").get_extension("quanto_cpp")
            extension._lib = SimpleNamespace(
                unpack=lambda codes, bits: torch.cat([codes >> at & (1 << bits) - 1 for at in range(0, 8, bits)])
            )
        library.freeze(model)
        return model.requires_grad_(False)

    return make


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "compressed-tensors W4A16": compressed(INT4),
    "compressed-tensors W4A16, asymmetric": compressed(INT4 | {"symmetric": False}),
    "compressed-tensors FP8": compressed({"num_bits": 8, "type": "float", "strategy": "channel"}),
    "compressed-tensors W8A8": compressed(
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "hqq 4 bits": hqq(4),
    "hqq 3 bits": hqq(3, axis=0),
    "quanto int8": quanto("qint8"),
    "quanto float8": quanto("qfloat8"),
    "quanto 4 bits": quanto("qint4"),
}


def numbers(layer: Any) -> Tensor:
    """Return what the codes of a layer stand for, by the library itself."""
    if hasattr(layer, "quantization_scheme"):
        base = importlib.import_module("compressed_tensors.compressors").BaseCompressor
        held = {name: t for name, t in layer._parameters.items() if t is not None and name != "bias"}
        return base.get_value_from_registry(layer.quantization_scheme.format).decompress(
            held, layer.quantization_scheme
        )["weight"]
    held = layer if hasattr(layer, "dequantize") else layer.weight
    return held if type(held) is nn.Parameter else held.dequantize()


def expected_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the library computes; the model stays as it is."""
    return copied(model)(x) if hasattr(model, "ct_decompress_hook") else model(x)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a compressed model that compressed-tensors has decompressed."""
    other = copy.deepcopy(model)
    importlib.import_module("compressed_tensors.compressors").ModelCompressor().decompress_model(other)
    return other
