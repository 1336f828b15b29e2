"""QLoRA: a base in NF4 by bitsandbytes, trained, saved, loaded beside the same codes, merged into plain weights."""

import tempfile

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lora_fx

torch.manual_seed(0)
folder = tempfile.mkdtemp()
small = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96,
)  # fmt: skip
LlamaForCausalLM(small).to(torch.bfloat16).save_pretrained(folder)

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16)
ids = torch.randint(0, 96, (2, 12))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

rules = {
    "version": 1,
    "rules": [{"name": "linears", "match": {"name": "**.*_proj"}, "lora": {"r": 8, "dropout": 0.05}}],
}
tuned = lora_fx.apply(model, rules, batch).train()
optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
losses = []
for _ in range(10):
    loss = tuned(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
tuned.eval()

adapter = tempfile.mkdtemp()
lora_fx.save(tuned, adapter)
with torch.no_grad():
    assert torch.equal(lora_fx.load(model, adapter)(**batch).logits, tuned(**batch).logits)

merged = lora_fx.merge(tuned)  # plain bfloat16: W' = dequantised W + scaling · B A
print(type(tuned.model.layers[0].mlp.up_proj).__name__, "→", type(merged.model.layers[0].mlp.up_proj).__name__)
