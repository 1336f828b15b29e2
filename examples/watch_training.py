"""Watch training: a record of losses and ‖ΔW‖ by layer, as text and as a picture."""

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
model = nn.Sequential(*(Block(32) for _ in range(4)), nn.Linear(32, 2))
x, y = torch.randn(64, 32), torch.randint(0, 2, (64,))

tuned = lora_fx.apply(model, r=4, target=["**.up", "**.down"], example_inputs=(x,))
optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)

with TemporaryDirectory() as folder:
    file = Path(folder) / "run.jsonl"
    with lora_fx.Recorder(tuned, file, every=2) as recorder:
        for _ in range(60):
            loss = nn.functional.cross_entropy(tuned(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    record = lora_fx.read_record(file)  # `lora-fx watch run.jsonl` prints it too
    print(record)
    Path(folder, "run.svg").write_text(record.to_svg(), encoding="utf-8")
    Path(folder, "run.html").write_text(record.to_html(), encoding="utf-8")
