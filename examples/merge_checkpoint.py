"""An adapter merged into a checkpoint on disk, tensor by tensor: no model is made, memory does not grow with it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=200, pad_token_id=0
)
model = LlamaForCausalLM(config).eval()
tuned = lora_fx.apply(model, "attention")
for parameter in lora_fx.parameters(tuned):
    torch.nn.init.normal_(parameter, std=0.02)  # as if it had been trained

with TemporaryDirectory() as folder:
    base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
    model.save_pretrained(base)
    lora_fx.save(tuned, adapter)
    print(lora_fx.merge_checkpoint(base, adapter, out))
    merged = LlamaForCausalLM.from_pretrained(out)

expected = lora_fx.merge(tuned).state_dict()
assert all(torch.equal(value, expected[name]) for name, value in merged.state_dict().items())
