"""Several adapters of PEFT's with rows of embeddings, and configurations with rows and biases as rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import lora_fx
from lora_fx.errors import RefusedError
from tests.support.around import IDS, IN_FILES, assert_close, llama, logits
from tests.support.wordmodels import model

pytestmark = IN_FILES
Q = {"target_modules": ["q_proj"], "r": 2}


def filled(theirs: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return theirs.eval()


def several(tied: bool, *rows: Any) -> Any:
    """Return a model of PEFT's with an adapter for each entry, with rows of the embedding or without."""
    theirs = None
    for name, ids in zip("abcd", rows, strict=False):
        config = peft.LoraConfig(**Q, **({"trainable_token_indices": ids} if ids else {}))
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(llama(tied)), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    return filled(theirs)


SEVERAL = {
    "the first of three": ([3, 7], None, None),
    "the second of three": (None, [3, 7], None),
    "the last of three": (None, None, [7, 3]),
    "two of three, on the same rows": ([3, 7], None, [7, 9]),
    "each": ([1], [1, 5], [9]),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("rows", SEVERAL.values(), ids=SEVERAL)
def test_each_adapter_is_the_same_here_and_there(rows, tied):
    theirs = several(tied, *rows)
    tuned = lora_fx.from_peft(theirs)
    back = lora_fx.to_peft(tuned)
    for name in "abc":
        for each in (theirs, back):
            each.base_model.set_adapter(name)
        lora_fx.use(tuned, name)
        assert_close(logits(tuned), logits(theirs))
        assert_close(logits(back), logits(theirs))
    assert_close(logits(lora_fx.remove(tuned)), logits(llama(tied)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_gradients_of_the_rows_are_the_same_here_and_there(tied):
    theirs = several(tied, [7, 3, 40])
    tuned = lora_fx.from_peft(theirs)
    for each in (theirs, tuned):
        each.train()(input_ids=IDS, labels=IDS).loss.backward()
    delta = theirs.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["a"]
    (rows,) = (p for name, p in tuned.named_parameters() if name.endswith("weight.rows"))
    assert_close(rows.grad, delta.grad[[1, 0, 2]])  # ours are in the order of their ids


def test_models_with_rows_train_alike():
    theirs = several(True, [7, 3, 40])
    tuned = lora_fx.from_peft(theirs)
    for each, parameters in ((theirs, theirs.parameters()), (tuned, lora_fx.parameters(tuned))):
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            each(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(tuned), logits(theirs), rtol=1e-4, atol=1e-4)


RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "by name": ({"trainable_token_indices": {"embed_tokens": [7, 3]}}, None),
    "by name, with the model": ({"trainable_token_indices": {"embed_tokens": [7, 3]}}, llama),
    "of the inputs": ({"trainable_token_indices": [7, 3]}, llama),
    "every bias": ({"bias": "all"}, None),
    "every bias, with the model": ({"bias": "all"}, llama),
    "biases of adapted layers": ({"bias": "lora_only"}, None),
}


@pytest.mark.parametrize(("settings", "make"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_rules_train_what_peft_trains(settings, make, tied):
    config = peft.LoraConfig(**Q, **settings)
    rules = lora_fx.rules_from_peft(config, make and make(tied))
    tuned = lora_fx.apply(with_biases(tied), rules, backend="modules")
    theirs = peft.get_peft_model(with_biases(tied), config)
    sizes = sorted(tuple(p.shape) for p in theirs.parameters() if p.requires_grad)
    assert sorted(tuple(p.shape) for p in lora_fx.parameters(tuned)) == sizes


def with_biases(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(**sizes, vocab_size=60, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


UNFIT: dict[str, tuple[dict[str, Any], Any]] = {
    "depends on the model(.|\n)*trainable_token_indices": ({"trainable_token_indices": [1]}, None),
    "lm_head: is no embedding": ({"trainable_token_indices": {"lm_head": [1]}}, llama),
    "words: PEFT would not give its rows to head.weight": ({"trainable_token_indices": {"words": [1]}}, model),
}


@pytest.mark.parametrize("words", UNFIT)
def test_rows_that_no_rule_can_say_are_refused_by_name(words):
    settings, make = UNFIT[words]
    config = peft.LoraConfig(target_modules=["q_proj", "q"], **settings)
    with pytest.raises(RefusedError, match=words):
        lora_fx.rules_from_peft(config, make and make())


def test_adapter_that_peft_itself_cannot_save_is_read():
    """PEFT 0.21 asks an adapter for the rows of another one, and raises KeyError."""
    theirs = several(False, [3, 7], None)
    with pytest.raises(KeyError):
        peft.get_peft_model_state_dict(theirs, adapter_name="b", save_embedding_layers=False)
    tuned = lora_fx.from_peft(theirs, adapter="b")
    theirs.base_model.set_adapter("b")
    assert_close(logits(tuned), logits(theirs))
    assert not any("rows" in name for name, _ in tuned.named_parameters())


def test_hook_on_a_layer_of_rows_is_refused():
    theirs = several(False, [3, 7])
    layer: nn.Module = theirs.base_model.model.model.embed_tokens.token_adapter
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RefusedError, match=r"embed_tokens.token_adapter +has a hook"):
        lora_fx.from_peft(theirs)
