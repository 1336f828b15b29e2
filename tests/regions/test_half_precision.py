"""Blocks in bfloat16 and float16: their graphs answer, their fast code is proven, and what is wrong in it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.fused.origin import told_layer_norm
from lora_fx.regions.checking import REGION, ModuleCall, Replay
from lora_fx.regions.install import regions
from lora_fx.regions.program import Program
from tests.regions.test_optimised import Tower, block, ordinary, trained
from tests.support import zoo
from tests.support.peers import BERT, LLAMA, Peer, adapted

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def used(tuned: nn.Module) -> Iterator[tuple[str, Program]]:
    """Yield the path of each region that has fast code, and the program that answered its last call."""
    return ((path, region.mine[0]) for path, _, region in regions(tuned) if region.mine[0].fast_passes)


@HALVES
@pytest.mark.parametrize("peer", [BERT, LLAMA], ids=lambda peer: peer.name)
@pytest.mark.sampled(2)
def test_blocks_of_a_model_in_half_precision_run_fast_code_that_is_proven(peer: Peer, dtype: torch.dtype):
    off = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0} if peer is BERT else {}
    before = lora_fx.apply(peer.build(**off).to(dtype), zoo.rules(r=4), peer.inputs(3, 7))
    for tuned in (before.train(), adapted(peer, **off).train().to(dtype)):
        hits = []
        for _ in range(3):
            trained(tuned, peer.call)
            hits.append(sum(region.hits for _, _, region in regions(tuned)))
        assert hits[2] - hits[1] == len(regions(tuned)), "every block answers by a graph"
        fast = dict(used(tuned))
        assert len(fast) == 2
        assert all(program.fast_proven and not program.why_not_fast for program in fast.values())
        tells = [program.fast.__globals__.values() for program in fast.values()]  # type: ignore[union-attr]
        assert [told_layer_norm in names for names in tells] == [peer is BERT] * 2


def scaled(module: Any, by: float) -> None:
    weight = module.q.lora_B["default"].weight
    module.q.lora_B["default"].weight = nn.Parameter(weight.detach() * by)


def swapped(module: Any) -> None:
    q, k = module.q.lora_A["default"], module.k.lora_A["default"]
    q.weight, k.weight = k.weight, q.weight


def another_epsilon(module: Any) -> None:
    module.norm.eps = 0.2


WRONG: dict[str, Callable[[Any], None]] = {
    "a factor of 1.06": lambda module: scaled(module, 1.06),
    "no adapter": lambda module: scaled(module, 0.0),
    "another layer's A": swapped,
    "another norm": another_epsilon,
}


@HALVES
@pytest.mark.parametrize("tokens", [6, 1])
def test_code_that_is_wrong_by_more_than_rounding_is_refused(dtype: torch.dtype, tokens: int):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 16, dtype=dtype, requires_grad=True)
    tuned = lora_fx.apply(Tower(block(ordinary)).to(dtype), zoo.rules(r=4), (x,)).train()
    tuned(x)
    module: Any = tuned.blocks[0]
    program = module.__dict__[REGION].mine[0]
    assert program.fast_proven

    def found(wrong: Callable[[Any], None] | None) -> str | None:
        def code(module: nn.Module, *inputs: Tensor) -> Any:
            if wrong is not None:
                wrong(module)
            return program.function(module, *inputs) if wrong is another_epsilon else program.fast(module, *inputs)

        replay = Replay(ModuleCall(module, module.forward, (x,), {}))
        return replay.fast_difference(code, program.guard.match_ones)

    assert found(None) is None
    for name, wrong in WRONG.items():
        reason = found(wrong)
        assert reason is not None, name
        assert "differs" in reason, name
