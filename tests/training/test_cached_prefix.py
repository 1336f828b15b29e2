"""What frozen blocks computed once is what they would compute again; else they compute, and it is said why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.bench.counters import flops
from tests.support.prefixes import (
    LENGTH,
    ROWS,
    adapted,
    assert_bits,
    bert,
    llama,
    rows,
    shuffled,
    stacked,
    trained,
)


def why(cache: lora_fx.PrefixCache) -> str:
    assert cache.report.hits == 0
    return ", ".join(cache.report.otherwise)


# -- training


@pytest.mark.slow
@pytest.mark.parametrize("optimise", [True, False, ["stack", "recompute", "liveness"]], ids=["usual", "plain", "live"])
@pytest.mark.parametrize("make", [llama, bert])
def test_two_shuffled_epochs_have_the_same_losses_and_gradients(make, optimise) -> None:
    batches = shuffled(2)
    expected = trained(adapted(make(), optimise=optimise), batches)
    tuned = adapted(make(), optimise=optimise)
    with lora_fx.cached_prefix(tuned) as cache:
        found = trained(tuned, batches)
    assert_bits(found, expected)
    assert (cache.report.hits, cache.report.misses, cache.report.whole_calls) == (ROWS, ROWS, 0)
    assert not cache.report.otherwise


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing() -> None:
    def checkpointed() -> nn.Module:
        tuned = adapted(llama())
        tuned.activation_checkpointing_enable({"use_reentrant": False})
        tuned.disable_input_require_grads()  # transformers wants gradients of embeddings, which nobody needs
        return tuned

    batches = shuffled(2)
    expected, tuned = trained(checkpointed(), batches), checkpointed()
    with lora_fx.cached_prefix(tuned) as cache:
        assert_bits(trained(tuned, batches), expected)
    assert (cache.report.hits, cache.report.misses) == (ROWS, ROWS)


def test_a_model_without_graphs_learns_them_on_the_way() -> None:
    batches = shuffled(2)
    expected = trained(adapted(llama(), backend="modules"), batches)
    tuned = adapted(llama(), backend="modules")
    with lora_fx.cached_prefix(tuned) as cache:
        assert_bits(trained(tuned, batches), expected)
    assert cache.report.hits == ROWS


def test_frozen_blocks_compute_nothing_for_data_that_comes_again() -> None:
    tuned, given = adapted(llama(), optimise=False), rows(range(4))
    tuned(**given)
    all_of_it = flops(lambda: tuned(**given))
    with lora_fx.cached_prefix(tuned):
        tuned(**given)
        again = flops(lambda: tuned(**rows([3, 1, 0, 2])))
    linears = 2 * 4 * LENGTH * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    attention = 2 * 2 * 4 * LENGTH * LENGTH * 32
    assert all_of_it - again == 2 * (linears + attention)  # of two blocks


def test_rows_that_are_new_are_computed_alone() -> None:
    expected = adapted(llama(), optimise=False)
    tuned = adapted(llama(), optimise=False)
    with lora_fx.cached_prefix(tuned) as cache:
        tuned(**rows([0, 1, 2, 3]))
        tuned(**rows([4, 5, 6, 7]))
        batch = [0, 8, 5, 9]
        assert_bits([tuned(**rows(batch)).loss], [expected(**rows(batch)).loss])
    assert (cache.report.hits, cache.report.misses) == (2, 10)


def test_evaluation_is_kept_apart_from_training() -> None:
    expected, tuned = adapted(llama()), adapted(llama())
    with lora_fx.cached_prefix(tuned) as cache:
        tuned(**rows([0, 1]))
        with torch.no_grad():
            for model in (expected, tuned):
                model.eval()
            assert_bits([tuned(**rows([0, 1])).logits], [expected(**rows([0, 1])).logits])
    assert cache.report.hits == 0


def test_other_dtypes_autocast_and_threads_are_other_data() -> None:
    tuned = adapted(llama(), optimise=False)
    with lora_fx.cached_prefix(tuned) as cache:
        tuned(**rows([0, 1]))
        with torch.autocast("cpu", torch.bfloat16):
            tuned(**rows([0, 1]))
        tuned.to(torch.bfloat16)
        tuned(**rows([0, 1]))
        tuned.float()
        tuned(**rows([0, 1]))
    # rounding to bfloat16 and back leaves other weights
    assert cache.report.hits == 0


# -- weights


def writes(layer: nn.Module, how: str) -> None:
    with torch.no_grad():
        if how == "in place":
            layer.weight.mul_(1.5)
        elif how == "through data":
            layer.weight.data.mul_(1.5)
        elif how == "one entry through data":
            layer.weight.data.view(-1)[7] += 1
        elif how == "another parameter":
            layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)
        else:
            layer.weight.data = layer.weight * 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["in place", "through data", "one entry through data", "another parameter", "another data"]
)
def test_changed_base_weights_are_seen_however_they_were_changed(how: str) -> None:
    expected, tuned = adapted(llama()), adapted(llama())
    with lora_fx.cached_prefix(tuned) as cache:
        tuned(**rows([0, 1]))
        for model in (expected, tuned):
            writes(model.model.layers[1].mlp.up_proj, how)
        assert_bits([tuned(**rows([0, 1])).loss], [expected(**rows([0, 1])).loss])
    assert cache.report.hits == 0


def test_weights_that_are_put_back_find_what_was_kept() -> None:
    tuned = adapted(llama())
    weight = tuned.model.layers[0].mlp.up_proj.weight
    with lora_fx.cached_prefix(tuned) as cache, torch.no_grad():
        tuned(**rows([0, 1]))
        before = weight.clone()
        weight.zero_()
        tuned(**rows([0, 1]))
        weight.copy_(before)
        tuned(**rows([0, 1]))
    assert (cache.report.hits, cache.report.misses) == (2, 4)


# -- why not


def test_dropout_in_train_mode_draws_as_it_did() -> None:
    batches = shuffled(2)
    torch.manual_seed(9)
    expected = trained(adapted(bert(0.1)), batches)
    torch.manual_seed(9)
    tuned = adapted(bert(0.1))
    with lora_fx.cached_prefix(tuned) as cache:
        assert_bits(trained(tuned, batches), expected)
        assert why(cache) == "it draws random numbers (dropout in train mode)"
        tuned.eval()
        with torch.no_grad():
            tuned(**rows([0, 1]))
            tuned(**rows([1, 0]))
    assert cache.report.hits == 2


def test_batch_norm_in_train_mode_computes() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))

    tuned = stacked(body, None, norm=nn.BatchNorm1d(8)).train()
    alone = copy.deepcopy(tuned)
    x = torch.randn(6, 8)
    with lora_fx.cached_prefix(tuned) as cache:
        for _ in range(3):
            assert_bits([tuned(x)], [alone(x)])
        assert "it writes to its buffers or arguments (batch norm in train mode)" in why(cache)
    assert_bits(list(tuned.buffers()), list(alone.buffers()))


def test_hooks_see_every_call() -> None:
    tuned = adapted(llama())
    seen = []
    handle = tuned.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with lora_fx.cached_prefix(tuned) as cache:
        for _ in range(3):
            tuned(**rows([0, 1]))
        assert cache.report.otherwise == {"a hook on model.layers.0.mlp": 3}
        handle.remove()
        for _ in range(3):
            tuned(**rows([0, 1]))
        assert len(cache.report.otherwise) == 1
    assert len(seen) == 3


def test_hidden_states_that_are_asked_for_are_there() -> None:
    expected, tuned = adapted(llama()), adapted(llama())
    given = {"output_hidden_states": True}
    with lora_fx.cached_prefix(tuned) as cache:
        for _ in range(3):
            found = tuned(**rows([0, 1]), **given).hidden_states
            assert_bits(list(found), list(expected(**rows([0, 1]), **given).hidden_states))
    assert cache.report.hits == 0


def test_a_cache_of_keys_and_values_is_filled_every_time() -> None:
    expected, tuned = adapted(llama()).eval(), adapted(llama()).eval()
    with lora_fx.cached_prefix(tuned) as cache, torch.no_grad():
        for _ in range(2):
            found = tuned(rows([0, 1])["input_ids"], use_cache=True).past_key_values
            other = expected(rows([0, 1])["input_ids"], use_cache=True).past_key_values
            assert_bits([layer.keys for layer in found.layers], [layer.keys for layer in other.layers])
        assert why(cache).startswith("argument past_key_values is a DynamicCache (of keys and values? pass")
        prompt = rows([0, 1])["input_ids"]
        settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
        assert torch.equal(tuned.generate(prompt, **settings), expected.generate(prompt, **settings))


def test_inputs_that_require_a_gradient_get_it() -> None:
    tuned = adapted(llama())
    with lora_fx.cached_prefix(tuned) as cache:
        for _ in range(3):
            embeds = tuned.get_input_embeddings()(rows([0])["input_ids"]).requires_grad_()
            tuned(inputs_embeds=embeds).logits.sum().backward()
            assert embeds.grad is not None
            assert embeds.grad.abs().sum() > 0
        assert why(cache).startswith("argument hidden_states requires a gradient")


def test_disabled_adapters_and_other_runs_of_the_base_are_right() -> None:
    base, tuned = copy.deepcopy(llama()).eval(), adapted(llama()).eval()
    with lora_fx.cached_prefix(tuned), torch.no_grad():
        for _ in range(2):
            tuned(**rows([0, 1]))
            with lora_fx.disabled(tuned):
                assert_bits([tuned(**rows([0, 1])).logits], [base(**rows([0, 1])).logits])


def test_a_block_that_trains_from_now_on_is_not_kept() -> None:
    tuned = adapted(llama())
    with lora_fx.cached_prefix(tuned) as cache:
        tuned(**rows([0, 1]))
        tuned.model.layers[1].mlp.up_proj.weight.requires_grad_()
        tuned(**rows([0, 1])).loss.backward()
        assert tuned.model.layers[1].mlp.up_proj.weight.grad is not None
        assert why(cache) == "model.layers.1: mlp.up_proj.weight is trained"


def test_a_forward_that_looks_at_values_computes() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else self.linear(-x)

    tuned = stacked(body, None)
    with lora_fx.cached_prefix(tuned) as cache:
        for _ in range(3):
            tuned(torch.ones(2, 8))
        assert "data-dependent" in why(cache)
