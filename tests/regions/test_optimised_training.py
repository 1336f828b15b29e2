"""Fast programs that are wrong are found out; whole trainings with and without passes; parameters that are sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.regions import program
from lora_fx.regions.gradients import gradients_differ
from tests.regions.test_optimised import assert_equal_but_for_rounding, fast_passes, programs, trained
from tests.support.peers import BERT, LLAMA, adapted, tensors
from tests.support.processes import in_processes

Spoil = Callable[[Tensor], Tensor]


def other_value(result: Tensor) -> Tensor:
    return result * 1.01


def other_gradient(result: Tensor) -> Tensor:
    return result + 0.05 * (result - result.detach())


def no_gradient(result: Tensor) -> Tensor:
    return result.detach()


def other_random_numbers(result: Tensor) -> Tensor:
    torch.rand(1)
    return result


def an_error(result: Tensor) -> Tensor:
    raise KeyError("spoilt")


WRONG = {
    other_value: "the result differs",
    other_gradient: "the gradient of",
    no_gradient: "other results require a gradient",
    other_random_numbers: "it draws other random numbers",
    an_error: "it fails: KeyError",
}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", WRONG, ids=lambda function: function.__name__)
def test_fast_program_that_is_wrong_is_given_up_with_the_reason(spoil: Spoil, monkeypatch: pytest.MonkeyPatch):
    right = program._optimised

    def wrong(*args: Any) -> Any:
        fast, passes = right(*args)
        if fast is None:
            return None, ()

        def function(module: nn.Module, *inputs: Any) -> Any:
            return torch.utils._pytree.tree_map_only(Tensor, spoil, fast(module, *inputs))

        return function, passes

    monkeypatch.setattr(program, "_optimised", wrong)
    for peer in (LLAMA, BERT):  # a norm before the layers, and one after them
        tuned, modules = adapted(peer, fresh=True), adapted(peer, "modules")
        assert_equal_but_for_rounding(*(trained(model.train(), peer.call) for model in (tuned, modules)))
        assert not fast_passes(tuned)
        reasons = {program.why_not_fast for program in programs(tuned) if program.why_not_fast}
        assert reasons
        assert all(reason.startswith(WRONG[spoil]) for reason in reasons), reasons


def test_gradient_that_is_only_rounding_gives_no_fast_program_up():
    """With one key the softmax is 1, and the gradient of the query nothing but rounding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100
    )
    torch.manual_seed(0)
    words = torch.randint(0, 100, (2, 16))
    sample = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    tuned = lora_fx.apply(transformers.LlamaForCausalLM(config).eval(), r=4, target="all-linear", example_inputs=sample)
    assert fast_passes(tuned)
    assert {program.why_not_fast for program in programs(tuned)} == {""}


def gradients(scale: float, error: float) -> tuple[Any, Any, nn.Module]:
    """Return a run in which the gradient of a weight is `scale` everywhere, or `scale + error`."""
    module = nn.Linear(4, 1, bias=False)
    x = torch.full((1, 4), scale + error)
    return module(x), (x,), module


@pytest.mark.parametrize(("error", "noise", "expected"), [
    (1e-6, 1e-6, None),
    (1e-6, 1e-8, "the gradient of weight differs"),
    (1e-6, 0.0, "the gradient of weight differs"),
    (1e-12, 0.0, None),
])  # fmt: skip
def test_gradients_may_differ_as_far_as_rounding_moves_them(error: float, noise: float, expected: str | None):
    def differ(*shaken: Any) -> str | None:
        return gradients_differ(gradients(1e-7, error), gradients(1e-7, 0.0), None, *shaken)

    assert differ(lambda: gradients(1e-7, noise)) == expected
    assert differ() == (None if error < 1e-9 else "the gradient of weight differs")


def losses(model: nn.Module, steps: int) -> Tensor:
    """Train a classifier on random words, whose label is whether the first two are in order; return all losses."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=3e-3)
    values = []
    for _ in range(steps):
        words = torch.randint(3, 60, (8, 6 + int(torch.randint(0, 3, ()))))
        loss = F.cross_entropy(model.train()(words)[0], (words[:, 0] < words[:, 1]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values)


@pytest.mark.slow
def test_sixty_steps_have_the_losses_of_sixty_steps_without_passes():
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    runs = [losses(adapted(BERT, random=False, optimise=optimise, **quiet), 60) for optimise in (True, False)]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)
    assert runs[0][-10:].mean() < 0.9 * runs[0][:10].mean()


@pytest.mark.slow
def test_sixty_steps_with_dropout_drop_the_same():
    runs = [losses(adapted(BERT, random=False, dropout=0.1, optimise=optimise), 60) for optimise in (True, False)]
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_demo_learns_the_same_with_and_without_passes():
    """In float64 and at a fifth of the demo's rate: at its own, trainings without any pass that start 1e-15 apart are 0.3
    apart after 200 steps."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
    try:
        sentiment = pytest.importorskip("sentiment")
    finally:
        sys.path.pop(0)
    training, _ = sentiment.read_reviews(120, 10)
    example = [lora_fx.call(**inputs) for inputs, _ in training.batches(16)[:2]]
    rules = {"version": 1, "rules": [{"match": {"name": "**.layer.**", "op": "linear"}, "lora": {"r": 8}}]}
    runs = []
    for optimise in (True, False):
        model = sentiment.fresh_model().double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        tuned = lora_fx.apply(model, rules, example, optimise=optimise).train()
        optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=2e-4)
        runs.append([])
        for inputs, labels in training.batches(4):
            loss = F.cross_entropy(tuned(**inputs).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            runs[-1].append(loss.item())
    assert len(runs[0]) == 30
    torch.testing.assert_close(*torch.tensor(runs), rtol=1e-6, atol=1e-6)


def trained_in_shards(_: Path) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, tuned = init_device_mesh("cpu", (1,)), adapted(LLAMA).train()
    for layer in tuned.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(tuned, mesh=mesh)
    for _ in range(2):
        torch.manual_seed(5)
        tuned.zero_grad()
        result = LLAMA.call(tuned)
        result.float().square().mean().backward()
    return [result.detach(), *(p.grad.full_tensor() for p in tuned.parameters() if p.requires_grad)]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_sharded_model_has_the_gradients_of_one_that_is_not(tmp_path: Path):
    expected = trained(adapted(LLAMA).train(), LLAMA.call)
    (sharded,) = in_processes(1, trained_in_shards, tmp_path)
    assert_equal_but_for_rounding(sharded, expected)


def test_keys_and_values_that_a_block_leaves_in_a_cache_are_those_without_passes():
    runs = []
    for optimise in (True, False):
        model = adapted(LLAMA, optimise=optimise).train()
        result = model(**LLAMA.inputs(3, 7), use_cache=True)
        result.past_key_values.layers[1].values.square().sum().backward()
        slopes = [parameter.grad for parameter in lora_fx.parameters(model)]
        kept = torch.cat(
            [
                tensor.detach().flatten()
                for layer in result.past_key_values.layers
                for tensor in tensors([layer.keys, layer.values])
            ]
        )
        runs.append([kept, *slopes])
    assert_equal_but_for_rounding(*runs)
