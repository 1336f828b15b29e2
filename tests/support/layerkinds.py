"""Kinds of sites that are layers: called, with lora modules beside their weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from tests.support.sitekinds import Kind

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_SIZES = {1: (9,), 2: (7, 8), 3: (5, 6, 7)}
_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 4},
    "valid": {"padding": "valid"},
    "dilated": {"dilation": 2, "padding": 2},
    "same, dilated": {"dilation": 2, "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 2, "padding_mode": "circular", "stride": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate", "dilation": 2},
    "same, reflect": {"padding": "same", "padding_mode": "reflect"},
    "same, circular, even kernel": {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
    "groups": {"groups": 2, "padding": 1},
    "groups, circular": {"groups": 2, "padding": 1, "padding_mode": "circular", "stride": 2},
    "depthwise": {"groups": 4, "padding": "same"},
    "depthwise, several filters": {"groups": 4, "out_channels": 12},
}
_QUICK: dict[int, set[str]] = {
    1: {"stride"},
    2: {"same, even kernel", "circular", "same, reflect", "groups, circular", "depthwise"},
    3: {"dilated"},
}
"""Those whose graphs are captured in every run."""


def convolution(dims: int, **settings: Any) -> nn.Module:
    return _CONVOLUTIONS[dims](**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **settings})


def _convolutions() -> list[Kind]:
    kinds = []
    for dims in (1, 2, 3):
        for name, settings in _SETTINGS.items():
            # built inside of a Sequential, so that the site has a path
            make = lambda dims=dims, settings=settings: nn.Sequential(convolution(dims, **settings))  # noqa: E731
            inputs = lambda dims=dims: (torch.randn(2, 4, *_SIZES[dims]),)  # noqa: E731
            kinds.append(
                Kind(
                    f"conv{dims}d {name}", make, inputs, {"0.weight": "out_in"}, linear=True, quick=name in _QUICK[dims]
                )
            )
    kernels = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "padding_mode": "circular"}
    kinds.append(
        Kind("conv2d uneven", lambda: nn.Sequential(convolution(2, **kernels)), lambda: (torch.randn(2, 4, 7, 8),),
             {"0.weight": "out_in"}, linear=True)
    )  # fmt: skip
    return kinds


class Shared(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Tied(nn.Module):
    """An embedding whose weight is the head's too: one parameter, looked up and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=2)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.tokens(ids)), self.tokens.weight)


class TiedModules(nn.Module):
    """The same with two modules; only one of them is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids)))


def hooked() -> nn.Module:
    """A linear whose input and output hooks change."""
    model = nn.Sequential(nn.Linear(6, 5))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, result: result * 3)
    return model


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Pair(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return F.linear(input, self.weight), self.bias


class Normalised(nn.Linear):
    """Its weight is made of its parameter: there is no product with the parameter itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight, dim=1), self.bias)


class ScaledConvolution(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, None) * 0.5


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embedding_dim**0.5


def ids() -> tuple[Tensor]:
    return (torch.randint(0, 11, (2, 7)),)


def rows() -> tuple[Tensor]:
    return (torch.randn(2, 3, 6),)


LAYERS = [
    Kind("linear", lambda: nn.Sequential(nn.Linear(6, 5)), rows, {"0.weight": "out_in"}, linear=True),
    Kind("two linears", lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4, bias=False)), rows,
         {"0.weight": "out_in", "2.weight": "out_in"}),
    Kind("linear, a vector", lambda: nn.Sequential(nn.Linear(6, 5)), lambda: (torch.randn(6),), {"0.weight": "out_in"}, linear=True),
    Kind("Conv1D of transformers", lambda: nn.Sequential(Conv1D(5, 6)), rows, {"0.weight": "in_out"}, linear=True),
    *_convolutions(),
    Kind("embedding", lambda: nn.Sequential(nn.Embedding(11, 6)), ids, {"0.weight": "in_out"}, linear=True),
    Kind("embedding, padding", lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=2)), ids, {"0.weight": "in_out"}, linear=True),
    Kind("shared", Shared, rows, {"a.weight": "out_in"}),
    Kind("tied in two modules, embedding adapted", TiedModules, ids, {"tokens.weight": "in_out"}),
    Kind("tied in two modules, head adapted", TiedModules, ids, {"head.weight": "out_in"}, linear=True),
    Kind("hooked", hooked, rows, {"0.weight": "out_in"}, linear=True),
]  # fmt: skip

SUBCLASSES = [
    Kind("tied in one module", Tied, ids, {"tokens.weight": "in_out"}, raw=True),
    Kind("scaled", lambda: nn.Sequential(Scaled(6, 5)), rows, {"0.weight": "out_in"}, raw=True, linear=True),
    Kind("linear of Falcon", lambda: nn.Sequential(FalconLinear(6, 5)), rows, {"0.weight": "out_in"}, raw=True, linear=True),
    Kind("tuple", lambda: nn.Sequential(Pair(6, 5)), rows, {"0.weight": "out_in"}, raw=True, linear=True),
    Kind("normalised", lambda: nn.Sequential(Normalised(6, 5)), rows, {"0.weight": "out_in"}, raw=True, drops=False),
    Kind("scaled convolution", lambda: nn.Sequential(ScaledConvolution(4, 8, 3)), lambda: (torch.randn(2, 4, 6, 6),),
         {"0.weight": "out_in"}, raw=True, linear=True),
    Kind("scaled embedding", lambda: nn.Sequential(ScaledEmbedding(11, 6)), ids, {"0.weight": "in_out"}, raw=True, linear=True),
]  # fmt: skip
