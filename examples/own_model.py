"""A model of your own: see the plan, train, save, load, merge."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import lora_fx


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


torch.manual_seed(0)
model = nn.Sequential(*(Block(32) for _ in range(3)), nn.Linear(32, 2))
x, y = torch.randn(64, 32), torch.randint(0, 2, (64,))

rules = {"version": 1, "rules": [{"name": "up", "match": {"name": "*.up"}, "lora": {"r": 4}}], "train": ["3"]}
plan = lora_fx.plan(model, rules, (x,))
print(plan)

tuned = lora_fx.apply(model, plan)
optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
for _ in range(20):
    loss = nn.functional.cross_entropy(tuned(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss after 20 steps: {loss.item():.3f}")

with TemporaryDirectory() as folder:
    lora_fx.save(tuned, Path(folder) / "adapter")
    again = lora_fx.load(model, Path(folder) / "adapter", (x,))
torch.testing.assert_close(again(x), tuned(x))

merged = lora_fx.merge(tuned)  # a plain nn.Sequential, which needs no lora_fx
torch.testing.assert_close(merged(x), tuned(x), rtol=1e-4, atol=1e-5)
