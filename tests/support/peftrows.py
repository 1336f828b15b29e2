"""PEFT's own list of LoRA on models that are not transformers', row by row, and what becomes of each here.

The facts of the list (which model, which settings) are those of `tests/test_custom_models.py` in the repository of PEFT
0.20; models and table are written anew.  The table of the documentation is made from the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Chain(nn.Module):
    """Modules one after another, by name, and a softmax behind them."""

    def __init__(self, inputs: Tensor, **steps: nn.Module) -> None:
        super().__init__()
        for name, step in steps.items():
            self.add_module(name, step)
        self.names, self.inputs = tuple(steps), (inputs,)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x.flatten(1).log_softmax(-1)


class Attending(nn.Module):
    """torch's attention, unbatched, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)
        self.inputs = (_numbers(9, 10),)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0]).log_softmax(-1)


class Product(nn.Module):
    """A linear of raw parameters, stored [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _mlp() -> nn.Module:
    return Chain(_numbers(9, 10), lin0=nn.Linear(10, 20), relu=nn.ReLU(), lin1=nn.Linear(20, 2))


def _convolving(name: str, layer: nn.Module, inputs: Tensor) -> nn.Module:
    width = layer(inputs).flatten(1).shape[1]
    return Chain(inputs, **{name: layer}, relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(width, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": _mlp,
    "EmbConv1D": lambda: Chain(
        torch.tensor([[0, 10], [3, 7], [10, 5]]),
        emb=nn.Embedding(100, 5),
        conv1d=Conv1D(1, 5),
        tanh=nn.Tanh(),
        flat=nn.Flatten(),
        lin0=nn.Linear(2, 2),
    ),
    "Conv1d": lambda: _convolving("conv1d", nn.Conv1d(1, 1, 2), _numbers(9, 1, 10)),
    "Conv2d": lambda: _convolving("conv2d", nn.Conv2d(5, 10, 3), _numbers(2, 5, 3, 3)),
    "Conv2dGroups": lambda: _convolving("conv2d", nn.Conv2d(16, 16, 3, groups=8), _numbers(2, 16, 3, 3)),
    "Conv2dGroups2": lambda: _convolving("conv2d", nn.Conv2d(16, 32, 3, padding=1, groups=2), _numbers(2, 16, 5, 5)),
    "Conv3d": lambda: _convolving("conv3d", nn.Conv3d(5, 10, 3), _numbers(2, 5, 3, 3, 3)),
    "MHA": Attending,
    "MlpUsingParameters": lambda: Chain(_numbers(9, 10), lin0=Product(10, 20), relu=nn.ReLU(), lin1=Product(20, 2)),
}
"""The models of the list, by their names there."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the list."""

    name: str
    model: str
    settings: dict[str, Any]
    """Of `peft.LoraConfig`."""
    refused: str = ""
    """The words with which it is refused here; empty where it loads and agrees."""
    saved_for: str = "PEFT"
    """Who reads what is saved of it again."""


def _row(name: str, model: str, *targets: str, refused: str = "", saved_for: str = "PEFT", **settings: Any) -> Row:
    return Row(name, model, {"target_modules": list(targets), **settings}, refused, saved_for)


GROUPED = "its lora_A reads the channels of all {} groups of the convolution"
OURS = "lora_fx"
ROWS = (
    Row("Vanilla MLP 1 LoRA", "MLP", {"target_modules": "lin0"}),
    _row("Vanilla MLP 2 LoRA", "MLP", "lin0"),
    _row("Vanilla MLP 3 LoRA", "MLP", "lin1"),
    _row("Vanilla MLP 4 LoRA", "MLP", "lin0", "lin1"),
    _row("Vanilla MLP 5 LoRA", "MLP", "lin0", modules_to_save=["lin1"]),
    _row("Vanilla MLP 6 LoRA", "MLP", "lin0", lora_alpha=4, lora_dropout=0.1),
    _row("Vanilla MLP 7 LoRA with DoRA", "MLP", "lin0", use_dora=True),
    _row("Vanilla MLP 8 LoRA with DoRA", "MLP", "lin0", "lin1", use_dora=True),
    _row(
        "Vanilla MLP 1 LoRA with KaSA",
        "MLP",
        "lin0",
        kasa_config=peft.KasaConfig(),
        r=4,
    ),
    _row("Vanilla MLP 1 LoRA with MiCA", "MLP", "lin0", init_lora_weights="mica", r=4),
    Row("Vanilla MLP 9 LoRA with DoRA", "MLP", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}),
    *(
        _row(name, "MLP", *targets, velora_config=peft.VeloraConfig(num_groups=2, init_type=kind))
        for name, kind, targets in (
            ("Vanilla MLP 10 LoRA with VeLoRA random", "random", ["lin0"]),
            ("Vanilla MLP 11 LoRA with VeLoRA batch_average", "batch_average", ["lin0", "lin1"]),
            ("Vanilla MLP 12 LoRA with VeLoRA batch_average_once", "batch_average_once", ["lin0"]),
        )
    ),
    _row("Embedding + transformers Conv1D 1 LoRA", "EmbConv1D", "conv1d"),
    _row("Embedding + transformers Conv1D 2 LoRA", "EmbConv1D", "emb"),
    _row("Embedding + transformers Conv1D 3 LoRA", "EmbConv1D", "emb", "conv1d"),
    _row("Embedding + transformers Conv1D 1 DoRA", "EmbConv1D", "conv1d", use_dora=True),
    _row("Embedding + transformers Conv1D 2 DoRA", "EmbConv1D", "emb", use_dora=True),
    _row("Embedding + transformers Conv1D 3 DoRA", "EmbConv1D", "emb", "conv1d", use_dora=True),
    _row(
        "Embedding + transformers Conv1D 1 LoRA trainable_tokens",
        "EmbConv1D",
        "conv1d",
        trainable_token_indices={"emb": [0, 10]},
    ),
    _row("Conv1d LoRA", "Conv1d", "conv1d"),
    _row("Conv1d LoRA with DoRA", "Conv1d", "conv1d", use_dora=True),
    _row("Conv2d 1 LoRA", "Conv2d", "conv2d"),
    _row("Conv2d 2 LoRA", "Conv2d", "conv2d", "lin0"),
    _row("Conv2d 1 LoRA with DoRA", "Conv2d", "conv2d", use_dora=True),
    _row("Conv2d 2 LoRA with DoRA", "Conv2d", "conv2d", "lin0", use_dora=True),
    _row("Conv2d Groups LoRA", "Conv2dGroups", "conv2d", refused=GROUPED.format(8)),
    _row("Conv2d Groups2 LoRA", "Conv2dGroups2", "conv2d", refused=GROUPED.format(2)),
    _row("Conv2d Groups LoRA with DoRA", "Conv2dGroups", "conv2d", use_dora=True, refused=GROUPED.format(8)),
    _row("Conv2d Groups2 LoRA with DoRA", "Conv2dGroups2", "conv2d", use_dora=True, refused=GROUPED.format(2)),
    _row("Conv3d 1 LoRA", "Conv3d", "conv3d"),
    _row("Conv3d 2 LoRA", "Conv3d", "conv3d", "lin0"),
    _row("Conv3d 1 LoRA with DoRA", "Conv3d", "conv3d", use_dora=True),
    _row("Conv3d 2 LoRA with DoRA", "Conv3d", "conv3d", "lin0", use_dora=True),
    _row("Vanilla MLP 1 LoRA with lora_b bias", "MLP", "lin0", "lin1", lora_bias=True, lora_alpha=32),
    _row("Conv2d 1 LoRA with lora_b bias", "Conv2d", "conv2d", lora_bias=True, lora_alpha=32),
    _row("Conv3d 1 LoRA with lora_b bias", "Conv3d", "conv3d", lora_bias=True, lora_alpha=32),
    _row("MHA 1 LoRA", "MHA", "mha", saved_for=OURS),
    _row("MHA 2 LoRA", "MHA", "mha", "lin0", saved_for=OURS),
    Row("MLP 1 using nn.Parameter LoRA", "MlpUsingParameters", {"target_parameters": ["lin0.weight"]}),
    _row("MLP 2 using nn.Parameter LoRA", "MLP", "lin0", target_parameters=["lin1.weight"]),
    _row("Vanilla MLP 1 LoRA with Monteclora", "MLP", "lin0", monteclora_config=peft.MontecloraConfig(num_samples=2)),
    _row(
        "BD-LoRA A only",
        "MLP",
        "lin0",
        "lin1",
        use_bdlora=BdLoraConfig(target_modules_bd_a=["lin0"], match_strict=False),
    ),
    _row(
        "BD-LoRA B only",
        "MLP",
        "lin0",
        "lin1",
        use_bdlora=BdLoraConfig(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False),
    ),
    _row(
        "BD-LoRA both A and B",
        "MLP",
        "lin0",
        "lin1",
        use_bdlora=BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
    ),
)


def table(rows: tuple[Row, ...] = ROWS) -> str:
    """Return the table of the documentation: what becomes of each row."""
    lines = ["| row of PEFT's list | here |", "|---|---|"]
    for row in rows:
        done = "loads, saves, agrees" if row.saved_for == "PEFT" else "loads and agrees; saved for lora_fx alone"
        lines.append(f"| {row.name} | {f'refused: {row.refused}' if row.refused else done} |")
    agreeing = sum(not row.refused for row in rows)
    return "\n".join([*lines, "", f"{agreeing} of {len(rows)} load and agree."])
