"""Gradients of weights that several sites share: of each site its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_fx


def test_a_tied_head_counts_by_its_own_gradient_and_not_by_that_of_the_embedding():
    class Tied(nn.Module):
        def __init__(self, is_tied: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.q, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.words.weight if is_tied else nn.Parameter(self.words.weight.detach().clone())

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.q(self.words(ids))))

    rules = {"rules": [{"match": {"name": "{q,head}"}, "lora": {"r": 4}}]}
    data = [(torch.arange(12).view(3, 4),)]
    tied, apart = (
        lora_fx.allocate(Tied(so), rules, data=data, loss=lambda output, _: output.square().mean()).sites
        for so in (True, False)
    )
    assert [(site.path, site.r, site.size) for site in tied] == [(s.path, s.r, s.size) for s in apart]
