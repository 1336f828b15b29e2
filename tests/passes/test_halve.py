"""halve: inputs of activations in bfloat16, for those who ask for it: results as before, gradients within its rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.bench.counters import saved_bytes
from lora_fx.errors import RefusedError
from lora_fx.regions.install import regions
from tests.support import zoo
from tests.support.peers import BERT, LLAMA, VIT, Peer, adapted

EXACT, HALVED = ("stack", "recompute"), ("stack", "recompute", "halve")


def fast_passes(tuned: nn.Module) -> set[str]:
    return {name for _, _, region in regions(tuned) for program in region.block.programs for name in program.optimised}


def trained(tuned: nn.Module, peer: Peer) -> list[Tensor]:
    torch.manual_seed(5)
    peer.call(tuned)
    torch.manual_seed(5)
    result = peer.call(tuned)
    return [result, *torch.autograd.grad(result.float().square().mean(), list(lora_fx.parameters(tuned)))]


@pytest.mark.parametrize("peer", [BERT, LLAMA, VIT], ids=lambda peer: peer.name)
def test_results_keep_their_bits_gradients_are_near_and_fewer_bytes_are_kept(peer: Peer):
    runs, kept = [], []
    for optimise in (EXACT, HALVED):
        tuned = adapted(peer, optimise=optimise).train()
        runs.append(trained(tuned, peer))
        kept.append(saved_bytes(lambda model=tuned: peer.call(model), [*tuned.parameters(), *tuned.buffers()]))
    assert "halve" in fast_passes(tuned)
    (result, *slopes), (expected, *others) = runs[1], runs[0]
    assert torch.equal(result, expected)
    largest = max(float(slope.abs().max()) for slope in others)
    differences = [float((one - other).abs().max()) for one, other in zip(slopes, others, strict=True)]
    assert 0 < max(differences) <= 2**-7 * largest
    assert kept[1] < 0.95 * kept[0]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def tower(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(Gated(), Gated()).to(dtype)
    tuned = lora_fx.apply(base, zoo.rules(r=2), (torch.randn(5, 8, dtype=dtype),), **options)
    zoo.randomise_(tuned)
    tuned(torch.randn(5, 8, dtype=dtype))
    return tuned.train()


def test_only_what_goes_into_activations_is_rounded():
    tuned, x = tower(optimise=HALVED), torch.randn(5, 8, requires_grad=True)
    tuned(x)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        tuned(x)
    assert [tuple(tensor.shape) for tensor in kept if tensor.dtype is torch.bfloat16] == [(5, 32)] * 2


def test_gradients_of_gradients_are_refused():
    tuned = tower(optimise=HALVED)
    (x,) = (torch.randn(5, 8, requires_grad=True),)
    with pytest.raises(RefusedError, match="gradients of gradients"):
        torch.autograd.grad(tuned(x).sum(), x, create_graph=True)
    torch.autograd.grad(tower()(x).sum(), x, create_graph=True)


def test_it_is_done_for_those_who_name_it():
    assert "halve" in fast_passes(tower(optimise=HALVED))
    assert fast_passes(tower()) == fast_passes(tower(optimise=EXACT))
    assert "halve" not in fast_passes(tower(torch.bfloat16, optimise=HALVED)), "it is kept in bfloat16 already"
    with pytest.raises(ValueError, match="name both"):
        tower(optimise=["halve"])
