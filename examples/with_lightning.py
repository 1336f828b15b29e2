"""Lightning trains a twin: checkpoints hold the adapter and the optimiser alone, and a training resumes from one."""

from pathlib import Path
from tempfile import TemporaryDirectory

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lora_fx
from lora_fx.integrations.lightning import LightningAdapterCheckpoints

torch.manual_seed(0)
x = torch.randn(64, 16)
DATA = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 2))
        self.model = lora_fx.apply(base, r=4, target="**", example_inputs=(x[:2],), optimise=False)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora_fx.parameters(self.model), lr=1e-2)


def fit(folder: str, epochs: int, resumed: str | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[LightningAdapterCheckpoints()], default_root_dir=folder, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DATA, ckpt_path=resumed)
    return trainer


with TemporaryDirectory() as home:
    whole = fit(f"{home}/whole", 2)
    first = fit(f"{home}/part", 1)
    checkpoint = first.checkpoint_callback.best_model_path
    resumed = fit(f"{home}/part", 2, checkpoint)
    pairs = zip(lora_fx.parameters(whole.model.model), lora_fx.parameters(resumed.model.model), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    size = Path(checkpoint).stat().st_size
    base = sum(p.numel() * 4 for p in lora_fx.remove(whole.model.model).parameters())
    print(f"a checkpoint has {size:,} bytes with the optimiser, the base {base:,}; resumed bit by bit")
