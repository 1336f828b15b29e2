"""Adapted real models compute what their bases compute, plus the adapters: values, gradients, what can be looked at."""

from __future__ import annotations

import inspect

import pytest
import torch

import lora_fx
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
    frozen,
    gradients,
    pair,
    tensors,
)

SHAPES = {torch.float32: ((3, 7), (1, 6), (2, 1), (1, 1)), torch.bfloat16: ((3, 7), (1, 6))}
"""(batch, length) of calls, for each dtype; models are captured at (2, 6) in float32."""


@each(QUICK, slow=LARGE)
@pytest.mark.parametrize("dtype", SHAPES, ids=str)
@pytest.mark.sampled(2)
def test_adapted_model_starts_bit_equal_to_its_base_in_every_mode_and_shape(peer: Peer, dtype: torch.dtype):
    base, tuned = frozen(peer).to(dtype), adapted(peer, random=False).to(dtype)
    for training in (False, True):
        for shape in SHAPES[dtype]:
            results = []
            for model in (base, tuned):
                torch.manual_seed(7)
                with torch.set_grad_enabled(training):
                    results.append(peer.call(model.train(training), *shape, dtype=dtype))
            assert results[0].dtype == dtype
            assert_same(*results)


@each(QUICK, slow=LARGE)
def test_adapters_with_values_give_the_outputs_and_gradients_of_the_module_backend(peer: Peer):
    graph_gives_what_modules_give(peer, torch.float32)


@each(QUICK, slow=LARGE)
def test_adapters_with_values_give_them_in_half_precision_too(peer: Peer):
    graph_gives_what_modules_give(peer, torch.bfloat16)


def graph_gives_what_modules_give(peer: Peer, dtype: torch.dtype) -> None:
    graph, modules = pair(peer)
    for training in (False, True):
        for shape in SHAPES[dtype][:2]:
            outputs, slopes = [], []
            for model in (graph, modules):
                torch.manual_seed(7)
                result = peer.call(model.to(dtype).train(training), *shape, dtype=dtype)
                outputs.append(result)
                slopes.append(gradients(model, result))
            assert_close(*outputs)
            assert_close(*slopes)


@each(QUICK, slow=LARGE)
def test_adapters_with_values_change_what_the_base_computes(peer: Peer):
    assert not torch.allclose(peer.call(adapted(peer)), peer.call(frozen(peer)), atol=1e-4)


@each(QUICK, slow=LARGE)
def test_every_block_runs_as_a_graph_at_other_sizes(peer: Peer):
    tuned = adapted(peer, fresh=True)
    for training in (False, True):
        for shape in ((3, 7), (4, 5)):
            with torch.set_grad_enabled(training):
                peer.call(tuned.train(training), *shape)
    _, misses = counts(tuned)
    assert misses == 0
    blocks = [path for path, module in tuned.named_modules() if type(module) is type(tuned.get_submodule(peer.block))]
    paths = [region.path for region in lora_fx.inspect(tuned).regions]
    assert set(blocks) <= set(paths)


@each((LLAMA, BERT, VIT), slow=(T5,))
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.sampled(2)
def test_what_a_model_shows_of_its_inside_is_what_the_base_shows(peer: Peer, asked: str):
    settings = {"attn_implementation": "eager"}
    base, tuned = frozen(peer, **settings), adapted(peer, random=False, **settings)
    given = peer.inputs(3, 7)
    with torch.no_grad():
        plain = tuned(**given)
        shown, expected = tuned(**given, **{asked: True}), base(**given, **{asked: True})
        assert_same(tuned(**given), plain)
    assert len(tensors(expected)) > len(tensors(plain))
    assert_same(shown, expected)


@each((LLAMA, BERT, VIT), slow=(T5,))
def test_hidden_states_and_attentions_of_adapters_with_values_are_those_of_the_module_backend(peer: Peer):
    graph, modules = pair(peer, attn_implementation="eager")
    shown = [
        model(**peer.inputs(3, 7), output_hidden_states=True, output_attentions=True) for model in (graph, modules)
    ]
    assert_close(*shown)


# -- what the model is


@each(QUICK, slow=LARGE)
def test_adapted_model_is_of_the_class_of_its_base_and_has_its_methods(peer: Peer):
    base, tuned = peer.build(), adapted(peer)
    assert isinstance(tuned, type(base))
    assert type(tuned).__name__ == type(base).__name__
    assert tuned.config.to_dict() if peer in TRANSFORMERS else dict(tuned.config) == dict(base.config)
    assert inspect.signature(tuned.forward) == inspect.signature(base.forward)
    block, own = tuned.get_submodule(peer.block), base.get_submodule(peer.block)
    assert isinstance(block, type(own))
    assert inspect.signature(block.forward) == inspect.signature(own.forward)
    assert tuned.num_parameters() > base.num_parameters()
    assert tuned.num_parameters(only_trainable=True) == sum(p.numel() for p in lora_fx.parameters(tuned))
    assert tuned.dtype == torch.float32


@each(QUICK, slow=LARGE)
def test_merged_model_is_saved_and_loaded_by_its_own_library(peer: Peer, tmp_path):
    tuned = adapted(peer)
    merged = lora_fx.merge(tuned)
    merged.save_pretrained(tmp_path)
    loaded = type(peer.build()).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_same(peer.call(loaded), peer.call(merged))
        assert_close(peer.call(loaded), peer.call(tuned))


def test_embeddings_are_found_resized_and_tied_by_the_models_own_methods():
    base = LLAMA.build()
    tuned = lora_fx.apply(base, {"version": 1, "rules": [{"match": {"name": "**.self_attn.*"}}]}, LLAMA.inputs(2, 6))
    assert torch.equal(tuned.get_input_embeddings().weight, base.get_input_embeddings().weight)
    for model in (base, tuned):
        torch.manual_seed(3)
        model.resize_token_embeddings(70)
    with torch.no_grad():
        assert LLAMA.call(tuned).shape == (3, 7, 70)
        assert_same(LLAMA.call(tuned), LLAMA.call(base))


# -- the checks themselves


def test_checks_of_this_file_fail_where_they_should():
    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.0 + 2**-20])
    with pytest.raises(AssertionError, match="tensor 1 of 2 differs"):
        assert_same([one, one], (one, other))
    assert_close(one, other)
    with pytest.raises(AssertionError):
        assert_close(one, one + 1e-4)
    with pytest.raises(AssertionError):
        assert_close([one], [one, one])
    for check in (assert_same, assert_close):
        with pytest.raises(AssertionError, match="no tensor to compare"):
            check([], {})
    with pytest.raises(AssertionError):
        assert_same(one, one.double())


def test_gradient_check_fails_where_a_gradient_is_missing():
    tuned = adapted(BERT)
    next(lora_fx.parameters(tuned)).requires_grad_(False)
    with pytest.raises(AssertionError):
        gradients(tuned, BERT.call(tuned))
