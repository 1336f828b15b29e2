"""Training adapted real models: activation checkpointing, accumulation, optimizers; graphs change nothing of it."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_fx
from tests.support import zoo
from tests.support.peers import (
    BERT,
    LARGE,
    LLAMA,
    QUICK,
    T5,
    TRANSFORMERS,
    VIT,
    Peer,
    adapted,
    assert_close,
    assert_same,
    counts,
    each,
    gradients,
    pair,
)

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


class Operations(TorchDispatchMode):
    """Counts the operations that only forwards do: code that recomputes a block does them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("silu", "gelu", "relu", "native_layer_norm", "native_group_norm"):
            self.number[name] += 1
        return func(*args, **(kwargs or {}))


def checkpoint_blocks(peer: Peer, model: nn.Module, reentrant: bool) -> None:
    """Switch checkpointing on as the users of the model's library do."""
    if peer in TRANSFORMERS:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    else:
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))


def trained(peer: Peer, model: nn.Module) -> tuple[Tensor, list[Tensor], Counter[str]]:
    """Return result, gradients and operations of one forward and backward in train mode."""
    given = peer.inputs(3, 7)
    for value in given.values():
        value.requires_grad_(value.is_floating_point())  # what reentrant checkpointing needs
    torch.manual_seed(7)
    with Operations() as operations:
        result = model.train()(**given)[0]
        slopes = gradients(model, result)
    return result, slopes, operations.number


@each(QUICK, slow=LARGE)
@REENTRANT
@pytest.mark.sampled(2)
def test_checkpointed_blocks_are_recomputed_and_gradients_stay_the_same(peer: Peer, reentrant: bool):
    graph, modules = pair(peer, fresh=True)
    *expected, without = trained(peer, modules)
    for model in (graph, modules):
        checkpoint_blocks(peer, model, reentrant)
    for _ in range(2):
        *ours, operations = trained(peer, graph)
        *_, wanted = trained(peer, modules)
        assert_close(ours, expected)
        assert sum(wanted.values()) > sum(without.values())
        assert not wanted - operations
        # UNet: what an optimised block outside of the checkpoints makes again
        assert sum((operations - wanted).values()) <= 1


@each(QUICK, slow=(T5,))
@REENTRANT
def test_checkpointed_blocks_run_as_graphs(peer: Peer, reentrant: bool):
    tuned = adapted(peer)
    checkpoint_blocks(peer, tuned, reentrant)
    trained(peer, tuned)
    hits, misses = counts(tuned)
    trained(peer, tuned)
    again_hits, again_misses = counts(tuned)
    assert again_misses == misses, lora_fx.inspect(tuned).regions
    assert again_hits > hits


@each((LLAMA, BERT, VIT), slow=(T5,))
def test_checkpointing_switched_off_again_recomputes_nothing(peer: Peer):
    tuned = adapted(peer, optimise=False)  # which recomputes norms and activations by itself
    *_, before = trained(peer, tuned)
    checkpoint_blocks(peer, tuned, reentrant=False)
    *_, between = trained(peer, tuned)
    tuned.activation_checkpointing_disable()
    *_, after = trained(peer, tuned)
    assert sum(between.values()) > sum(before.values())
    assert after == before


class OwnCheckpoint(nn.Module):
    """Blocks that checkpoint a part of themselves, as diffusion models do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp, self.out = nn.LayerNorm(16), zoo.Mlp(), nn.Linear(16, 16)
            self.reentrant = False

        def forward(self, x: Tensor) -> Tensor:
            inner = checkpoint(self.inside, x, use_reentrant=self.reentrant) if self.training else self.inside(x)
            return x + self.out(inner)

        def inside(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


@REENTRANT
def test_what_a_block_checkpoints_inside_itself_is_still_recomputed(reentrant: bool):
    base = OwnCheckpoint()
    for block in base.blocks:
        block.reentrant = reentrant
    given = (zoo.features(2, 3),)
    graph = lora_fx.apply(base, zoo.rules("**", init="random"), given)
    modules = lora_fx.apply(base, zoo.rules("**"), given, backend="modules")
    modules.load_state_dict(graph.state_dict())
    results = []
    for model in (graph, modules):
        with Operations() as operations:
            result = model.train()(zoo.features(4, 5).requires_grad_())[0]
            results.append((result, gradients(model, result)))
        assert operations.number == {"native_layer_norm": 4, "gelu": 4}
    assert_close(*results)


@each(QUICK, slow=LARGE)
def test_training_steps_give_the_adapters_of_the_module_backend(peer: Peer):
    """Three steps with dropout, two batches of other sizes accumulated in each, weight decay and clipping."""
    graph, modules = pair(peer)
    for model in (graph, modules):
        torch.manual_seed(7)
        model.train()
        optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-3)
        for turn in range(3):
            optimizer.zero_grad()
            for shape in ((2, 5 + turn), (3, 4)):
                peer.call(model, *shape).float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(lora_fx.parameters(model), 1.0)
            optimizer.step()
    assert_close(list(lora_fx.parameters(graph)), list(lora_fx.parameters(modules)))
    start = adapted(peer)
    moved = [not torch.equal(a, b) for a, b in zip(lora_fx.parameters(graph), lora_fx.parameters(start), strict=True)]
    assert all(moved)
    assert counts(graph)[1] <= 6


def test_base_is_never_trained():
    base = LLAMA.build()
    before = copy.deepcopy(base.state_dict())
    tuned = lora_fx.apply(base, zoo.rules(r=2), LLAMA.inputs(2, 6))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0, weight_decay=0.1)
    gradients(tuned, LLAMA.call(tuned.train()))
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert all(torch.equal(tuned.state_dict()[key], value) for key, value in before.items())
    assert [name for name, p in base.named_parameters() if p.requires_grad] == [*dict(base.named_parameters())]


def test_part_of_the_adapter_frozen_during_training_gets_no_gradient():
    graph, modules = pair(BERT)
    for model in (graph, modules):
        for name, parameter in model.named_parameters():
            if "layer.0" in name:
                parameter.requires_grad_(False)
        result = BERT.call(model.train(False))
        result.square().mean().backward()
    ours, theirs = ([p.grad for p in lora_fx.parameters(model)] for model in (graph, modules))
    assert [slope is None for slope in ours] == [slope is None for slope in theirs]
    assert any(slope is None for slope in ours)
    assert_close(ours, theirs)


def test_unfrozen_base_weight_gets_the_gradient_of_the_module_backend():
    graph, modules = pair(BERT)
    path = "bert.encoder.layer.1.intermediate.dense.weight"
    for model in (graph, modules):
        model.get_parameter(path).requires_grad_(True)
        BERT.call(model).square().mean().backward()
    assert_close(graph.get_parameter(path).grad, modules.get_parameter(path).grad)


def test_double_backward_gives_what_it_gives_in_the_module_backend():
    results = []
    for model in pair(BERT, attn_implementation="eager"):
        (slope, *_) = torch.autograd.grad(
            BERT.call(model).square().mean(), list(lora_fx.parameters(model)), create_graph=True
        )
        results.append(torch.autograd.grad(slope.square().sum(), list(lora_fx.parameters(model))[:4]))
    assert_close(*results)


def test_result_that_is_kept_survives_later_calls():
    tuned = adapted(LLAMA)
    with torch.no_grad():
        first = LLAMA.call(tuned)
        kept = first.clone()
        LLAMA.call(tuned, 2, 5)
    assert_same(first, kept)


def test_count_of_operations_sees_a_recomputed_block():
    block = nn.Sequential(nn.LayerNorm(4), nn.GELU())
    x = torch.randn(2, 4, requires_grad=True)
    numbers = []
    for run in (block, partial(checkpoint, block, use_reentrant=False)):
        with Operations() as operations:
            run(x).sum().backward()
        numbers.append(dict(operations.number))
    assert numbers == [{"native_layer_norm": 1, "gelu": 1}, {"native_layer_norm": 2, "gelu": 1}], (
        "what is last is not needed"
    )
