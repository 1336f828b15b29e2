"""An adapter merged into a checkpoint of several files, tensor by tensor, in the same memory for any size."""

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
    model.save_pretrained(base, max_shard_size="150KB")
    lora_fx.save(tuned, adapter)
    print(lora_fx.merge_checkpoint(base, adapter, out))
    files = [sorted(file.name for file in place.glob("*.safetensors")) for place in (base, out)]
    assert files[0] == files[1]
    print(f"in {len(files[1])} files, as the base")
    merged = LlamaForCausalLM.from_pretrained(out)

expected = lora_fx.merge(tuned).state_dict()
assert all(torch.equal(value, expected[name]) for name, value in merged.state_dict().items())
