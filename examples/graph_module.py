"""A torch.fx graph of your own: LoRA nodes put into it, seen, and taken out again."""

import torch
from torch import fx, nn

import lora_fx

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
graph = fx.symbolic_trace(model)
x = torch.randn(5, 16)

rules = {"version": 1, "rules": [{"name": "all", "match": {"op": "linear"}, "lora": {"r": 2}}]}
tuned = lora_fx.apply(graph, rules)
assert isinstance(tuned, fx.GraphModule)
print(tuned.code)

nn.init.normal_(tuned.get_parameter("0.lora_B.default.weight"))  # as if it had been trained
print(lora_fx.diff(graph, tuned))

merged = lora_fx.merge(tuned)  # a GraphModule without LoRA nodes, its weights changed
torch.testing.assert_close(merged(x), tuned(x))
assert torch.equal(lora_fx.remove(tuned)(x), model(x))
