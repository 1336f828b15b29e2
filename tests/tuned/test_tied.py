"""Tied weights: adapting one user of a shared weight never changes another, before or after a merge, or in a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import lora_fx
from tests.support.kinds import EFFECT, OUTPUT, distance
from tests.support.zoo import randomise_, rules

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 7, 9], [3, 4, 2, 8]])
ONE = {"input_ids": IDS}
TWO = {"input_ids": IDS, "decoder_input_ids": IDS}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "intermediate_size": 24}
T5_SIZES = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16, **special))


def bert() -> nn.Module:
    """Its decoder's bias is tied too."""
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=16))


def t5() -> nn.Module:
    """Four users of one weight; its config forces the flag to be set, and scales by what a file says of it."""
    return T5ForConditionalGeneration(T5Config(**T5_SIZES, decoder_start_token_id=0))


def umt5() -> nn.Module:
    """As T5, and its forward asks for the flag."""
    return UMT5ForConditionalGeneration(UMT5Config(**T5_SIZES, decoder_start_token_id=0))


MODELS = {
    "llama": (llama, ONE, "lm_head", "model.embed_tokens", False),
    "gpt2": (gpt2, ONE, "lm_head", "transformer.wte", False),
    "bert": (bert, ONE, "cls.predictions.decoder", "bert.embeddings.word_embeddings", False),
    "t5": (t5, TWO, "lm_head", "decoder.embed_tokens", True),
    "umt5": (umt5, TWO, "lm_head", "decoder.embed_tokens", True),
}
"""A model, its inputs, head, embedding, and what its config says of ties after a merge: where the flag means more than
ties, it stays."""


def built(make) -> nn.Module:
    """Return a model in eval mode whose outputs depend on every weight."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def adapted(base: nn.Module, names: list[str], inputs) -> nn.Module:
    tuned = lora_fx.apply(base, rules(names), lora_fx.call(**inputs), backend="modules").eval()
    randomise_(tuned)
    return tuned


def logits(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_adapting_the_head_leaves_the_embedding_alone(name):
    make, inputs, head, embedding, _ = MODELS[name]
    base = built(make)
    before = base.get_submodule(embedding).weight.clone()
    tuned = adapted(base, [head], inputs)
    merged = lora_fx.merge(tuned)
    for model in (base, tuned, merged):
        assert torch.equal(model.get_submodule(embedding).weight, before)
        assert torch.equal(model.get_submodule(embedding)(IDS), base.get_submodule(embedding)(IDS))
    assert not torch.equal(merged.get_submodule(head).weight, before)
    assert distance(logits(base, inputs), logits(tuned, inputs)) > EFFECT
    assert distance(logits(merged, inputs), logits(tuned, inputs)) < OUTPUT


@pytest.mark.parametrize("name", MODELS)
def test_adapting_the_embedding_leaves_the_head_alone(name):
    make, inputs, head, embedding, _ = MODELS[name]
    base = built(make)
    before = base.get_submodule(head).weight.clone()
    tuned = adapted(base, [embedding], inputs)
    merged = lora_fx.merge(tuned)
    assert all(torch.equal(model.get_submodule(head).weight, before) for model in (base, tuned, merged))
    assert distance(base.get_submodule(embedding)(IDS), tuned.get_submodule(embedding)(IDS)) > EFFECT
    assert distance(logits(merged, inputs), logits(tuned, inputs)) < OUTPUT


@pytest.mark.parametrize("users", ["head", "embedding", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_model_computes_the_same_after_it_was_saved_and_loaded(name, users, tmp_path):
    make, inputs, head, embedding, flag = MODELS[name]
    base = built(make)
    own = copy.deepcopy(base.config.to_dict())
    tuned = adapted(base, {"head": [head], "embedding": [embedding], "both": [head, embedding]}[users], inputs)
    merged = lora_fx.merge(tuned)
    merged.save_pretrained(tmp_path)
    loaded, info = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert distance(logits(merged, inputs), logits(tuned, inputs)) < OUTPUT
    assert torch.equal(logits(loaded.eval(), inputs), logits(merged, inputs))
    assert (merged.config.tie_word_embeddings, loaded.config.tie_word_embeddings) == (flag, flag)
    assert base.config.to_dict() == own
    assert tuned.config.to_dict() == own


@pytest.mark.parametrize("name", MODELS)
def test_merging_what_is_not_tied_leaves_the_ties(name, tmp_path):
    make, inputs, head, embedding, _ = MODELS[name]
    base = built(make)
    merged = lora_fx.merge(adapted(base, ["**.{q_proj,c_attn,query,q}"], inputs))
    assert merged.get_submodule(head).weight is merged.get_submodule(embedding).weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path).eval()
    assert loaded.get_submodule(head).weight is loaded.get_submodule(embedding).weight
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_removing_the_adapters_of_both_gives_back_the_tie(name):
    make, inputs, head, embedding, _ = MODELS[name]
    base = built(make)
    plain = lora_fx.remove(adapted(base, [head, embedding], inputs))
    assert plain.get_submodule(head).weight is plain.get_submodule(embedding).weight
    assert torch.equal(logits(plain, inputs), logits(base, inputs))
    assert plain.config.to_dict() == base.config.to_dict()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_tying_again_does_not_undo_the_merge(name):
    make, inputs, head, _, _ = MODELS[name]
    merged = lora_fx.merge(adapted(built(make), [head], inputs))
    before = logits(merged, inputs)
    merged.tie_weights()
    assert torch.equal(logits(merged, inputs), before)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_adapter_of_a_tied_head_is_saved_and_loaded(name, tmp_path):
    make, inputs, head, _, _ = MODELS[name]
    base = built(make)
    tuned = adapted(base, [head], inputs)
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(logits(lora_fx.load(base, tmp_path), inputs), logits(tuned, inputs))


# -- ties in plain torch


class Tied(nn.Module):
    """An embedding, and a head that is the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.mix(self.words(ids)).tanh())


class TiedLinears(nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, ids):
        return self.b(self.a(self.words(ids)).tanh())


@pytest.mark.parametrize(
    ("make", "names", "others"),
    [
        (Tied, ["head"], ["words"]),
        (Tied, ["words"], ["head"]),
        (Tied, ["words", "head"], []),
        (TiedLinears, ["a"], ["b"]),
        (TiedLinears, ["a", "b"], []),
    ],
)
def test_plain_tie_is_undone_by_a_merge_for_the_adapted_alone(make, names, others, tmp_path):
    base = built(make)
    tuned = lora_fx.apply(base, rules(names), lora_fx.call(IDS), backend="modules").eval()
    randomise_(tuned)
    with torch.no_grad():
        wanted = tuned(IDS)
        merged = lora_fx.merge(tuned)
        assert distance(base(IDS), wanted) > EFFECT
        assert distance(merged(IDS), wanted) < OUTPUT
    for other in others:
        assert torch.equal(merged.get_submodule(other).weight, base.get_submodule(other).weight)
    torch.save(merged.state_dict(), tmp_path / "state.pt")
    fresh = make()
    first, second = ("words", "head") if make is Tied else ("a", "b")
    fresh.get_submodule(second).weight = nn.Parameter(torch.empty_like(fresh.get_submodule(first).weight))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(fresh.eval()(IDS), merged(IDS))
    assert base.get_submodule(first).weight is base.get_submodule(second).weight


def test_plan_names_what_a_site_is_tied_to():
    sites = {site.path: site.site.tied_to for site in lora_fx.plan(built(llama), rules("lm_head")).sites}
    assert sites["lm_head"] == ("model.embed_tokens.weight",)
    assert sites["model.embed_tokens"] == ("lm_head.weight",)
