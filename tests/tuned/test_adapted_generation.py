"""generate() of an adapted model: the tokens of the module backend and of the merged model, from graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.peers import BERT, LLAMA, T5, Peer, adapted, counts, each, padded, pair, tokens

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
}
NEW = 8
PEER_AND_WAYS = pytest.mark.parametrize(
    ("peer", "ways"),
    [
        pytest.param(LLAMA, ("greedy", "sampling", "scores", "beams"), id="llama"),
        pytest.param(T5, ("greedy", "sampling", "scores"), id="t5", marks=pytest.mark.slow),
        pytest.param(T5, ("beams",), id="t5-beams", marks=pytest.mark.slow),
        pytest.param(LLAMA, ("static cache", "no cache"), id="llama-caches", marks=pytest.mark.slow),
        pytest.param(T5, ("static cache", "no cache"), id="t5-caches", marks=pytest.mark.slow),
    ],
)


def generated(model: nn.Module, batch: int = 1, length: int = 5, **options: Any) -> Tensor:
    """Return the tokens that the model generates after prompts padded on the left, always `NEW` of them."""
    torch.manual_seed(5)
    given = {"input_ids": tokens(batch, length), "attention_mask": padded(batch, length, "left")}
    result = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return result.sequences if options.get("return_dict_in_generate") else result


@PEER_AND_WAYS
@pytest.mark.filterwarnings("ignore::lora_fx.LoraFxWarning")  # many ways of generating are many graphs
def test_generated_tokens_are_those_of_the_module_backend_and_of_the_merged_model(peer: Peer, ways: tuple[str, ...]):
    graph, modules = pair(peer)
    merged = lora_fx.merge(graph)
    for way in ways:
        for batch in (1, 2):
            result = generated(graph, batch, **WAYS[way])
            assert result.shape[1] >= NEW
            assert torch.equal(result, generated(modules, batch, **WAYS[way])), (way, batch)
            assert torch.equal(result, generated(merged, batch, **WAYS[way])), (way, batch)


@each((LLAMA,), slow=(T5,))
def test_adapters_change_the_generated_tokens(peer: Peer):
    assert not torch.equal(generated(adapted(peer), 2), generated(adapted(peer, random=False), 2))


@each((LLAMA,), slow=(T5,))
@pytest.mark.parametrize("way", ["greedy", pytest.param("beams", marks=pytest.mark.slow)])
def test_decoding_runs_as_graphs_once_the_steps_are_known(peer: Peer, way: str):
    tuned = adapted(peer, fresh=True)
    for batch in (1, 2):
        before = counts(tuned)
        generated(tuned, batch, **WAYS[way])
        learning = counts(tuned)
        generated(tuned, batch, length=7, **WAYS[way])
        after = counts(tuned)
        assert learning[0] - before[0] > learning[1] - before[1], lora_fx.inspect(tuned).regions
        assert after[0] - learning[0] >= 9 * (after[1] - learning[1]), lora_fx.inspect(tuned).regions


def test_cache_filled_by_the_base_is_continued_by_the_adapted_model_and_the_other_way_round():
    base, (graph, modules) = LLAMA.build(), pair(LLAMA)
    prompt, following = tokens(2, 6), tokens(2, 3)
    for first, second in ((base, graph), (graph, base), (graph, graph)):
        results = []
        for stand_in in (graph, modules):
            models = [stand_in if model is graph else model for model in (first, second)]
            with torch.no_grad():
                cache = models[0](input_ids=prompt, use_cache=True).past_key_values
                results.append(models[1](input_ids=following, past_key_values=cache).logits)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_cache_grows_by_exactly_one_entry_a_step():
    tuned = adapted(LLAMA)
    with torch.no_grad():
        cache = tuned(input_ids=tokens(2, 6), use_cache=True).past_key_values
        for length in (7, 8, 9):
            cache = tuned(input_ids=tokens(2, 1), past_key_values=cache).past_key_values
            assert cache.get_seq_length() == length
            assert cache.layers[1].keys.shape == (2, 2, length, 8)


def test_disabled_model_generates_what_its_base_generates_and_goes_on_as_before():
    base, tuned = LLAMA.build(), adapted(LLAMA)
    before = generated(tuned, 2)
    with lora_fx.disabled(tuned):
        assert torch.equal(generated(tuned, 2), generated(base, 2))
    assert torch.equal(generated(tuned, 2), before)


def test_counts_see_calls_without_a_graph():
    tuned = adapted(BERT, "modules")
    BERT.call(tuned)
    assert counts(tuned) == (0, 0)
    tuned = adapted(BERT)
    tuned.bert.encoder.layer[0].register_forward_hook(lambda module, args, out: None)
    tuned.bert.encoder.layer[1].attention.register_forward_hook(lambda module, args, out: None)
    BERT.call(tuned)
    assert counts(tuned)[1] == 1
