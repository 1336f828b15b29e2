"""attention: its result is made again, for those who ask for it by its name: the same bits, and fewer bytes kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.bench.counters import saved_bytes
from lora_fx.regions.install import regions
from tests.support import zoo
from tests.support.peers import BERT, LLAMA, Peer, adapted

USUAL, NAMED = ("stack", "recompute"), ("stack", "recompute", "attention")


def passes_of(tuned: nn.Module) -> set[str]:
    return {name for _, _, region in regions(tuned) for program in region.block.programs for name in program.optimised}


def trained(tuned: nn.Module, peer: Peer) -> list[Tensor]:
    peer.call(tuned)
    result = peer.call(tuned)
    return [result, *torch.autograd.grad(result.float().square().mean(), list(lora_fx.parameters(tuned)))]


@pytest.mark.parametrize("peer", [BERT, LLAMA], ids=lambda peer: peer.name)
def test_results_and_gradients_keep_their_bits_and_fewer_bytes_are_kept(peer: Peer):
    runs, kept = [], []
    off = {"attention_probs_dropout_prob": 0.0} if peer is BERT else {}
    for optimise in (USUAL, NAMED):
        tuned = adapted(peer, optimise=optimise, attn_implementation="sdpa", **off).train()
        runs.append(trained(tuned, peer))
        kept.append(saved_bytes(lambda model=tuned: peer.call(model), [*tuned.parameters(), *tuned.buffers()]))
    assert "attention" in passes_of(tuned)
    assert all(map(torch.equal, *runs))
    assert kept[1] < 0.96 * kept[0]


class Attention(nn.Module):
    """Attention of grouped heads under a mask, with dropout in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.key, self.value = nn.Linear(32, 16), nn.Linear(32, 16)
        self.p = p

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = [layer(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        query, key, value = heads[0], *(one[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for one in heads[1:])
        p = self.p if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p)
        return x + self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


def tower(p: float, optimise: tuple[str, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    inputs = torch.randn(2, 9, 32), torch.rand(2, 1, 9, 9) > 0.2
    tuned = lora_fx.apply(Tower(p), zoo.rules(r=2), inputs, optimise=optimise).train()
    zoo.randomise_(tuned)
    return tuned, inputs


class Tower(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(p) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_repeated_keys_are_not_kept_and_attention_that_draws_is_left_alone(p: float):
    found, kept = [], []
    for optimise in (USUAL, NAMED):
        tuned, inputs = tower(p, optimise)
        for _ in range(2):
            torch.manual_seed(3)
            result = tuned(*inputs)
        slopes = torch.autograd.grad(result.square().sum(), list(lora_fx.parameters(tuned)))
        found.append([result, *slopes, torch.rand(1)])
        kept.append(saved_bytes(lambda model=tuned: model(*inputs), [*tuned.parameters(), *inputs]))
    assert all(map(torch.equal, *found))
    assert kept[1] < 0.75 * kept[0] if p == 0 else kept[1] == kept[0]
    assert ("not optimised: attention: it drops out" in str(lora_fx.inspect(tuned))) is (p > 0)


def test_a_norm_in_half_precision_that_ends_a_block_is_not_kept_for_the_next():
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        tuned = adapted(BERT, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).train().to(dtype)
        for _ in range(2):  # the first captures
            trained(tuned, BERT)
        kept.append(saved_bytes(lambda model=tuned: BERT.call(model), [*tuned.parameters(), *tuned.buffers()]))
    assert 2 * kept[1] < 1.04 * kept[0]
