"""Rows of embeddings and biases of other layers in files, with PEFT as the oracle both ways."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors.torch import load_file

import lora_fx
from lora_fx.files.adapter.contents import contents_of
from tests.support.around import IDS, IN_FILES, assert_close, filled, llama, logits
from tests.support.wordmodels import WORDS, Words, fill, model, rows_in, rules, trained

pytestmark = IN_FILES
ROWS = [3, 7, 40]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])


def llama_rules(**more: Any) -> dict[str, Any]:
    tokens = [{"name": "**.embed_tokens", "ids": ROWS}]
    return {"rules": [{"match": {"name": "**.q_proj"}, "lora": {"r": 2}}], "tokens": tokens, **more}


def in_peft(base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


@TIED
def test_peft_reads_rows_and_gives_the_same_results_and_gradients(tied, tmp_path):
    tuned = filled(lora_fx.apply(llama(tied), llama_rules(), backend="modules"))
    lora_fx.save(tuned, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": ROWS}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in tensors if "token" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    theirs = in_peft(llama(tied), tmp_path)
    assert_close(logits(tuned), logits(theirs))
    for each in (tuned, theirs):
        each(input_ids=IDS, labels=IDS).loss.backward()
    delta = theirs.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    (rows,) = rows_in(tuned).values()
    assert_close(rows.grad, delta.grad)
    theirs_a = theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert_close(tuned.model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad, theirs_a.grad)


@TIED
def test_saved_rows_are_loaded_bit_by_bit(tied, tmp_path):
    tuned = filled(lora_fx.apply(llama(tied), llama_rules(), backend="modules"))
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(llama(tied), tmp_path)
    assert torch.equal(logits(loaded), logits(tuned))
    assert len(rows_in(loaded)) == 1
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight) == tied
    lora_fx.save(loaded, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert "rows of an embedding" in contents_of(tmp_path).features


def test_weights_that_are_tied_without_a_config_are_rows_of_both_for_peft(tmp_path):
    tuned = trained()
    lora_fx.save(tuned, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"head": [3, 7, 11], "words": [3, 7, 11]}
    theirs = in_peft(model(), tmp_path)
    assert_close(tuned(WORDS), theirs(WORDS))
    loaded = lora_fx.load(model(), tmp_path)
    assert torch.equal(loaded(WORDS), tuned(WORDS))
    assert len(rows_in(loaded)) == 1


def test_adapter_of_many_has_its_own_rows_in_its_file(tmp_path):
    tuned = trained()
    lora_fx.add(tuned, rules([7, 2], adapter="b"))
    fill(tuned, "b", 6)
    lora_fx.add(tuned, {"rules": rules()["rules"]}, adapter="c")
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(model(), tmp_path)
    for name in ("default", "b", "c", None):
        for each in (tuned, loaded):
            lora_fx.use(each, name)
        assert torch.equal(loaded(WORDS), tuned(WORDS)), name
    fresh = lora_fx.load(model(), tmp_path / "c")
    lora_fx.add(fresh, tmp_path / "b", adapter="d")
    lora_fx.use(tuned, "b")
    lora_fx.use(fresh, "d")
    assert torch.equal(fresh(WORDS), tuned(WORDS))


class Shifted(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.flip(-1))


def headed(bias: bool = True) -> Words:
    torch.manual_seed(0)
    caller = Words(tied=False).eval()
    caller.head = nn.Linear(6, 20, bias=bias)
    caller.head.weight = caller.words.weight
    return caller


BEYOND = {
    "a forward of its own": (lambda: model(kind=Shifted), "words has a forward|its class has a forward of its own"),
    "a bias beside tied rows": (headed, "PEFT would leave out its bias"),
}


@pytest.mark.parametrize(("make", "words"), BEYOND.values(), ids=BEYOND)
def test_rows_that_peft_would_compute_otherwise_make_it_fail(make, words, tmp_path):
    tuned = lora_fx.apply(make(), rules(), backend="modules")
    fill(tuned)
    lora_fx.save(tuned, tmp_path)
    with pytest.raises(ValueError, match="only lora_fx can read this adapter"):
        in_peft(make(), tmp_path)
    with pytest.raises(lora_fx.RefusedError, match=words):
        lora_fx.to_peft(tuned)
    assert torch.equal(lora_fx.load(make(), tmp_path)(WORDS), tuned(WORDS))


def test_rows_with_which_peft_computes_otherwise_are_refused_when_read(tmp_path):
    theirs = peft.get_peft_model(headed(), peft.LoraConfig(target_modules=["q"], trainable_token_indices={"head": [1]}))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lora_fx.RefusedError, match=r"head +PEFT would leave out its bias"):
        lora_fx.load(headed(), tmp_path)


def test_rows_named_twice_are_refused(tmp_path):
    lora_fx.save(trained(), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"trainable_token_indices": {"words": [3, 3, 11], "head": [3, 7, 11]}}
    path.write_text(json.dumps(config))
    with pytest.raises(lora_fx.AdapterFileError, match="names a row of words twice"):
        lora_fx.load(model(), tmp_path)


def test_rows_that_a_smaller_vocabulary_lacks_are_refused_when_added(tmp_path):
    larger = llama()
    larger.resize_token_embeddings(64, mean_resizing=False)
    tokens = [{"name": "**.embed_tokens", "ids": [61]}]
    lora_fx.save(lora_fx.apply(larger, llama_rules(tokens=tokens), backend="modules"), tmp_path)
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"embed_tokens.weight(.|\n)*resize_token_embeddings"):
        lora_fx.load(llama(), tmp_path)
    assert lora_fx.load(larger, tmp_path).get_input_embeddings().num_embeddings == 64


@TIED
def test_embeddings_with_rows_are_not_resized(tied):
    tuned = lora_fx.apply(llama(tied), llama_rules(), backend="modules")
    with pytest.raises(lora_fx.RefusedError, match="cannot be resized"):
        tuned.resize_token_embeddings(64)
    assert tuned.resize_token_embeddings(60) is tuned.get_input_embeddings()
    larger = llama(tied)
    larger.resize_token_embeddings(64, mean_resizing=False)
    tokens = [{"name": "**.embed_tokens", "ids": ["60..64"]}]
    grown = filled(lora_fx.apply(larger, llama_rules(tokens=tokens), backend="modules"))
    merged = lora_fx.merge(grown)
    assert_close(logits(merged), logits(grown))
    assert merged.config.tie_word_embeddings == tied


def test_swapping_values_refuses_a_file_with_rows(tmp_path):
    tuned = trained()
    lora_fx.save(tuned, tmp_path)
    with pytest.raises(lora_fx.RefusedError, match=r"words +has rows that are trained"):
        lora_fx.swap(tuned, tmp_path, adapter="default")


def with_biases() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60, attention_bias=True, mlp_bias=True)).eval()


BIASES: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "of layers": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "all, and a module": {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["mlp.up_proj"]},
    "all, and rows": {"target_modules": ["q_proj"], "bias": "all", "trainable_token_indices": [4, 1]},
    "all, and what lora_B adds": {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
}


def theirs_with(settings: dict[str, Any]) -> Any:
    twin = peft.get_peft_model(with_biases(), peft.LoraConfig(r=2, **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return twin


@pytest.mark.parametrize("settings", BIASES.values(), ids=BIASES)
def test_biases_of_peft_are_read_and_written_as_it_does(settings, tmp_path):
    theirs = theirs_with(settings)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lora_fx.load(with_biases(), tmp_path / "theirs")
    assert_close(logits(loaded), logits(theirs))
    assert_close(logits(lora_fx.from_peft(theirs)), logits(theirs))
    with lora_fx.disabled(loaded):
        assert torch.equal(logits(loaded), logits(with_biases()))
    lora_fx.save(loaded, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(with_biases(), tmp_path / "ours").eval()
    assert_close(logits(back), logits(theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(logits(lora_fx.to_peft(loaded)), logits(theirs))


@pytest.mark.parametrize("settings", BIASES.values(), ids=BIASES)
def test_one_step_moves_the_same_biases_here_and_there(settings, tmp_path):
    theirs = theirs_with({key: value for key, value in settings.items() if key != "lora_bias"})
    tuned = lora_fx.from_peft(theirs)
    trained_there = [p for p in theirs.parameters() if p.requires_grad]
    for each, parameters in ((theirs, trained_there), (tuned, list(lora_fx.parameters(tuned)))):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        each(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert_close(logits(tuned), logits(theirs))


def test_bias_that_the_model_lacks_is_refused(tmp_path):
    theirs_with(BIASES["all"]).save_pretrained(tmp_path)
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"o_proj.bias +file a bias +model has no such parameter"):
        lora_fx.load(llama(), tmp_path)
