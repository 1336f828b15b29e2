"""A vision transformer: queries and values adapted, the new head trained whole and saved with the adapter."""

import torch
from transformers import ViTConfig, ViTForImageClassification

import lora_fx

torch.manual_seed(0)
config = ViTConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
    num_labels=3,
)  # fmt: skip
model = ViTForImageClassification(config)
images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8,))

rules = {
    "version": 1,
    "rules": [{"name": "attention", "match": {"name": "**.{q,query,q_proj,v,value,v_proj}"}, "lora": {"r": 4}}],
    "train": ["classifier"],
}
tuned = lora_fx.apply(model, rules, {"pixel_values": images, "labels": labels})
optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
losses = []
for _ in range(10):
    loss = tuned(pixel_values=images, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
print(lora_fx.inspect(tuned))
