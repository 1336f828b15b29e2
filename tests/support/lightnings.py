"""LightningModules that hold an adapted model or are one themselves, and short trainings of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

import lora_fx
from tests.support import runs


class Stepping(lightning.LightningModule):
    """Trains as the plain loop does."""

    adam = False

    def training_step(self, batch: Any, number: int) -> Tensor:
        return runs.loss_of(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(lora_fx.parameters(self), lr=0.01)
        return runs.optimizer_of(self)


class Holding(Stepping):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    @classmethod
    def make(cls, adam: bool = False) -> Holding:
        made = cls(runs.adapted())
        made.adam = adam
        return made


class Itself(Stepping):
    """Has the layers of the base itself, under the same names."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in runs.base().named_children():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x

    @staticmethod
    def make(adam: bool = False) -> nn.Module:
        made = runs.adapted(Itself())
        made.adam = adam
        return made


def by_hand(model: nn.Module) -> Stepping:
    class ByHand(Holding):
        automatic_optimization = False

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss = super().training_step(batch, number)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    return ByHand(model)


def fitted(
    module: nn.Module,
    folder: Path,
    *callbacks: Any,
    ckpt_path: Path | None = None,
    batches: int = runs.STEPS,
    **options: Any,
) -> Any:
    """Return the Trainer that has trained the module on the batches of the plain loop, or on fewer."""
    x, y = (torch.cat(parts) for parts in zip(*runs.batches(batches), strict=True))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
        default_root_dir=folder, **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def keys(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)["state_dict"])
