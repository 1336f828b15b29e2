"""A decoder of transformers: attention adapted, the tied head left alone, text generated with and without."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=200, pad_token_id=0
)
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(1, 200, (2, 12))

tuned = lora_fx.apply(model, "attention", {"input_ids": tokens, "labels": tokens})  # a rule file that comes along
assert isinstance(tuned, LlamaForCausalLM)

tuned.train()
optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
for _ in range(5):
    loss = tuned(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

tuned.eval()
prompt = tokens[:, :4]
adapted = tuned.generate(prompt, max_new_tokens=4, do_sample=False)
with lora_fx.disabled(tuned):  # the base, on the same object
    base = tuned.generate(prompt, max_new_tokens=4, do_sample=False)
assert torch.equal(base, model.generate(prompt, max_new_tokens=4, do_sample=False))
print("adapted:", adapted[0].tolist(), "base:", base[0].tolist())
print(lora_fx.inspect(tuned))
