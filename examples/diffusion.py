"""A diffusion model: the attention of a UNet adapted, written as the file that diffusers' pipelines load."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import UNet2DConditionModel

import lora_fx

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
    cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
inputs = lora_fx.call(torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 24))
noise = torch.randn(2, 4, 8, 8)

rules = {
    "version": 1,
    "rules": [{"name": "attention", "match": {"name": "**.{to_q,to_k,to_v,to_out.0}"}, "lora": {"r": 4, "alpha": 4}}],
}
tuned = lora_fx.apply(unet, rules, inputs)
optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-3)
for _ in range(3):
    loss = (tuned(*inputs.args).sample - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{len(lora_fx.plan(unet, rules).adapted)} linears adapted, loss {loss.item():.3f}")

with TemporaryDirectory() as folder:
    print(lora_fx.export(tuned, Path(folder) / "lora", target="diffusers"))
