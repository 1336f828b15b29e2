#!/usr/bin/env bash
# Who:       lightning 2.6.6 (torch 2.13.0).
# What:      a checkpoint that ModelCheckpoint(every_n_train_steps=...) writes within an epoch is resumed by
#            Trainer.fit(..., ckpt_path=...): the number of the batch goes on, the data begin anew. The rest of that
#            epoch trains a second time on what the run has seen already and never on the epoch's last batches, even if
#            nothing is shuffled. There is no warning of that.
# Expected:  steps 2, 3 on batches 2, 3 of the epoch of four.
# Seen:      in one go              batch_idx 0, 1, 2, 3 with the data of batches 0, 1, 2, 3
#            resumed after step 2   batch_idx 2, 3 with the data of batches 0, 1
# Way out:   resume from the end of an epoch, or use a loader with a state of its own.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6
cat > "$folder/run.py" <<'PYTHON'
import logging
import pathlib
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
BATCHES, SIZE = 4, 2
DATA = TensorDataset(torch.arange(BATCHES * SIZE, dtype=torch.float32)[:, None])


class Line(L.LightningModule):
    """Notes (epoch, batch_idx, which batch of the data it is) of every step."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, int(batch[0][0, 0]) // SIZE))
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(home, steps, every, resumed=None):
    saving = ModelCheckpoint(dirpath=home, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    model = Line()
    trainer = L.Trainer(callbacks=[saving], max_steps=steps, **quiet)
    trainer.fit(model, DataLoader(DATA, batch_size=SIZE), ckpt_path=resumed)
    return model.seen


print("torch", torch.__version__, "lightning", L.__version__)
home = pathlib.Path(sys.argv[1])
whole = fit(home / "whole", 4, 2)
within = fit(home / "within", 4, 100, home / "whole" / "step=2.ckpt")
for name, seen in (("in one go", whole), ("after step 2", within)):
    print(f"{name:13} (epoch, batch_idx, data): {seen}")
if whole != [(0, batch, batch) for batch in range(BATCHES)]:
    sys.exit("changed: a run in one go does not take the batches in turn")
if within != [(0, 2, 0), (0, 3, 1)]:
    sys.exit("changed: a run that is resumed within an epoch trains on other data")
print("as described: within an epoch the number of the batch goes on, and the data begin anew")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
