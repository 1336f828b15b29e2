"""Data parallel by accelerate: `accelerate launch --config_file examples/accelerate.yaml examples/with_accelerate.py`.

Without `accelerate launch` it runs in one process.
"""

import sys
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lora_fx


def base() -> nn.Sequential:
    torch.manual_seed(0)  # the same values in every process
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # or processes do not find each other
    model = base()
    x = torch.randn(64, 16)
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16 // accelerator.num_processes)
    tuned = lora_fx.apply(model, r=4, target=["0", "2"], example_inputs=(x[:2],))  # first this, then prepare
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
    wrapped, optimizer, data = accelerator.prepare(tuned, optimizer, data)
    for _ in range(5):
        for inputs, labels in data:
            loss = nn.functional.cross_entropy(wrapped(inputs), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    mean = accelerator.reduce(loss.detach(), "mean")
    tuned = accelerator.unwrap_model(wrapped)
    if accelerator.is_main_process:
        lora_fx.save(tuned, folder)
        loaded = lora_fx.load(base(), folder)
        with torch.no_grad():
            assert (loaded(x) - tuned.cpu()(x)).abs().max() < 1e-5
        hits = sum(region.hits for region in lora_fx.inspect(tuned).regions)
        print(f"{accelerator.num_processes} processes, loss {mean:.4f}, {hits} calls ran as graphs")
    accelerator.end_training()


if len(sys.argv) > 1:
    main(sys.argv[1])
else:
    with TemporaryDirectory() as home:
        main(home)
