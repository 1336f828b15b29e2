"""Several rules: ranks by shape, parts of a fused weight, a skip with its reason, a check of how much matches."""

import torch
from torch import nn

import lora_fx


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


torch.manual_seed(0)
blocks = [nn.ModuleDict({"attention": Attention(32), "mlp": nn.Linear(32, 32)}) for _ in range(2)]
model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(32, 100)})

rules = {
    "version": 1,
    "defaults": {"r": 4, "alpha": 8},
    "rules": [
        {"name": "query-value", "match": {"name": "**.qkv", "shape": ["3*d", "d"]},
         "slices": {"of": ["q", "k", "v"], "adapt": ["q", "v"]}, "expect": 2},
        {"name": "square", "match": {"shape": ["d", "d"]}, "lora": {"r": 8, "alpha": 16}},
        {"name": "head", "match": {"name": "head"}, "skip": "a new vocabulary is trained later"},
    ],
}  # fmt: skip
plan = lora_fx.plan(model, rules)
print(plan)
assert [site.path for site in plan.sites if site.decision == "skip"] == ["head"]
print(lora_fx.explain(model, "blocks.0.attention.qkv", rules))
