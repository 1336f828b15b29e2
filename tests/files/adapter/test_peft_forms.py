"""Files in every form that PEFT writes and reads again mean here what they mean there, or are refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors.torch import load_file, save_file

import lora_fx
from tests.support.around import IN_FILES, assert_close, llama, logits

WEIGHTS = "adapter_model.safetensors"
pytestmark = IN_FILES


def written(model: nn.Module, folder: Path, save: dict[str, Any] | None = None, **settings: Any) -> nn.Module:
    """Return the model in PEFT, with values in all that it trains, after saving that to the folder."""
    config = peft.LoraConfig(r=2, lora_alpha=4, **settings)
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    twin.save_pretrained(folder, **(save or {}))
    return twin


Q = ["q_proj"]
FORMS: dict[str, dict[str, Any]] = {
    "targets that the model lacks": {"target_modules": [*Q, "query_key_value"]},
    "excluded names": {"target_modules": [*Q, "v_proj"], "exclude_modules": ["v_proj"]},
    "an excluding expression": {"target_modules": [*Q, "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
    "a head both target and trained whole": {"target_modules": [*Q, "lm_head"], "modules_to_save": ["lm_head"]},
    "layers both target and trained whole": {"target_modules": [*Q, "v_proj"], "modules_to_save": ["v_proj"]},
    "base embeddings written along": {"target_modules": Q, "save": {"save_embedding_layers": True}},
    "base embeddings of a tied model": {"target_modules": Q, "save": {"save_embedding_layers": True}, "tied": True},
    "an embedding": {"target_modules": [*Q, "embed_tokens"]},
    "embedding and head": {"target_modules": [*Q, "embed_tokens", "lm_head"]},
    "tied, embedding trained": {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied, head trained": {"target_modules": Q, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tied, an embedding": {"target_modules": [*Q, "embed_tokens"], "ensure_weight_tying": True, "tied": True},
    "tied, a head": {"target_modules": [*Q, "lm_head"], "ensure_weight_tying": True, "tied": True},
    "rows of an embedding": {"target_modules": Q, "trainable_token_indices": [9, 3]},
    "rows by name": {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [7, 1]}},
    "tied, rows": {"target_modules": Q, "trainable_token_indices": [9, 3], "tied": True},
    "tied, rows of the head": {"target_modules": Q, "trainable_token_indices": {"lm_head": [9, 3]}, "tied": True},
    "tied, other rows of both": {
        "target_modules": Q,
        "trainable_token_indices": {"embed_tokens": [5], "lm_head": [7, 1]},
        "tied": True,
    },
    "MiCA": {"target_modules": Q, "init_lora_weights": "mica"},
    "look-around": {"target_modules": Q, "rank_pattern": {r"(?!.*layers\.0).*q_proj": 4}},
    "a back-reference": {"target_modules": r".*q_proj", "rank_pattern": {r"layers\.(\d)\..*(q)_proj": 4}},
    "some layers": {"target_modules": Q, "layers_to_transform": [1]},
    "every linear": {"target_modules": "all-linear"},
    "biases": {"target_modules": Q, "bias": "lora_only"},
    "a norm trained whole": {"target_modules": Q, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_form_is_read_as_peft_reads_it(form, tmp_path):
    settings = dict(form)
    tied = settings.pop("tied", "ensure_weight_tying" in settings)
    model = llama(tied)
    written(model, tmp_path, **settings)
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    loaded = lora_fx.load(model, tmp_path)
    assert_close(logits(loaded), logits(expected))
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-2), "the adapter has an effect"


def test_targets_that_the_model_lacks_are_told(tmp_path):
    written(llama(), tmp_path, target_modules=[*Q, "query_key_value"])
    with pytest.warns(lora_fx.LoraFxWarning, match="query_key_value, which the model lacks"):
        lora_fx.load(llama(), tmp_path)


def edited(folder: Path, tensors: Any = None, **config: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@pytest.mark.parametrize("targets", [Q, r".*\.q_proj"], ids=str)
def test_layers_that_a_file_lacks_are_named(targets, tmp_path):
    written(llama(), tmp_path, target_modules=targets)
    edited(tmp_path, lambda given: {key: value for key, value in given.items() if "layers.1" not in key})
    with pytest.warns(lora_fx.LoraFxWarning, match=r"model.layers.1.self_attn.q_proj, and the file has no factors"):
        lora_fx.load(llama(), tmp_path)


WHOLE: list[dict[str, Any]] = [
    {},
    {"exclude_modules": ["v_proj"]},
    {"exclude_modules": r".*layers\.1.*"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1, "layers_pattern": "layers"},
]


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_whole_file_is_read_without_a_word(settings, tmp_path):
    written(llama(), tmp_path, target_modules=[*Q, "v_proj"], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora_fx.LoraFxWarning)
        lora_fx.load(llama(), tmp_path)


def test_setting_that_nobody_knows_is_refused_if_it_is_on(tmp_path):
    written(llama(), tmp_path, target_modules=Q)
    edited(tmp_path, use_tomorrows_lora=False, written_by="another tool")
    lora_fx.load(llama(), tmp_path)
    edited(tmp_path, use_tomorrows_lora=True)
    with pytest.raises(lora_fx.AdapterFileError, match=r"use_tomorrows_lora +is true, and not known"):
        lora_fx.load(llama(), tmp_path)


def test_base_weights_written_along_count_where_they_differ(tmp_path):
    model = llama()
    written(model, tmp_path, target_modules=Q, save={"save_embedding_layers": True})
    edited(tmp_path, lambda given: {k: v * 2 if k.endswith("lm_head.weight") else v for k, v in given.items()})
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    loaded = lora_fx.load(model, tmp_path)
    assert_close(logits(loaded), logits(expected))
    assert {id(parameter) for parameter in loaded.lm_head.parameters()} <= set(map(id, lora_fx.parameters(loaded)))


SPOILT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rows without values": ({}, {"trainable_token_indices": [1, 2]}, "names rows, and the file has none"),
    "more values than rows": ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [3]}, "has none"),
    "values without rows": ({"trainable_token_indices": [3]}, {"trainable_token_indices": None}, "of no kind that"),
    "no rows": ({}, {"trainable_token_indices": {"lm_head": [-1]}}, "must be a list of integers, or one for each"),
    "no bias of B": ({}, {"lora_bias": True}, r"q_proj\.lora_B\.bias +is missing"),
}


@pytest.mark.parametrize(("settings", "change", "words"), SPOILT.values(), ids=SPOILT)
def test_file_that_contradicts_its_configuration_is_refused(settings, change, words, tmp_path):
    written(llama(), tmp_path, target_modules=Q, **settings)
    edited(tmp_path, **change)
    with pytest.raises(lora_fx.AdapterFileError, match=words):
        lora_fx.load(llama(), tmp_path)


def test_rows_that_the_model_lacks_are_refused(tmp_path):
    model = llama()
    model.resize_token_embeddings(64, mean_resizing=False)
    written(model, tmp_path, target_modules=Q, trainable_token_indices=[3, 61])
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"embed_tokens\.weight"):
        lora_fx.load(llama(), tmp_path)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_bias_for_a_layer_without_one_is_refused_for_every_site_and_peft_cannot_merge_it(tmp_path):
    model = llama()
    written(model, tmp_path, target_modules=Q, lora_bias=True)
    with pytest.raises(lora_fx.RefusedError, match="has none to add it to") as caught:
        lora_fx.load(model, tmp_path)
    assert {path.rpartition(".")[2] for path, _ in caught.value.refusals} == set(Q)
    with pytest.raises(RuntimeError, match="because the base layer has no bias"):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).merge_and_unload()


def test_bias_of_its_own_for_a_layer_without_one_does_not_fit(tmp_path):
    written(llama(), tmp_path, target_modules=Q)
    bias = {f"base_model.model.model.layers.0.self_attn.{Q[0]}.base_layer.bias": torch.zeros(16)}
    edited(tmp_path, lambda given: given | bias)
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"a bias +model none that belongs to the site"):
        lora_fx.load(llama(), tmp_path)


def test_rows_of_a_resized_vocabulary_are_asked_for(tmp_path):
    model = llama()
    model.resize_token_embeddings(64, mean_resizing=False)
    written(model, tmp_path, target_modules=Q, save={"save_embedding_layers": True})
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"\[64, 16\].*\[60, 16\]"):
        lora_fx.load(llama(), tmp_path)


def test_tensor_that_belongs_to_nothing_is_refused(tmp_path):
    written(llama(), tmp_path, target_modules=Q)
    edited(tmp_path, lambda given: given | {"base_model.model.nothing.weight": torch.ones(2)})
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"nothing.weight.*has no such tensor"):
        lora_fx.load(llama(), tmp_path)


def test_file_whose_keys_lack_the_prefix_is_refused_where_peft_loads_it_without_effect(tmp_path):
    model = llama()
    written(model, tmp_path, target_modules=Q)
    edited(tmp_path, lambda given: {key.removeprefix("base_model.model."): value for key, value in given.items()})
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()), logits(model))
    with pytest.raises(lora_fx.AdapterFileError, match=r"\(file\) +has no lora_A or lora_B"):
        lora_fx.load(model, tmp_path)


def test_every_layer_of_a_file_counts_where_peft_without_targets_takes_its_own_list(tmp_path):
    model = llama()
    twin = written(model, tmp_path, target_modules=[*Q, "o_proj"])
    edited(tmp_path, target_modules=None)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert not torch.allclose(logits(theirs), logits(twin), atol=1e-2), "o_proj is dropped"
    assert_close(logits(lora_fx.load(model, tmp_path)), logits(twin))


def test_factors_in_eight_bit_floats_are_read(tmp_path):
    model = llama()
    written(model, tmp_path, target_modules=Q)
    edited(tmp_path, lambda given: {key: value.to(torch.float8_e4m3fn) for key, value in given.items()})
    loaded = lora_fx.load(model, tmp_path)
    rounded = {key: value.float() for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(rounded, tmp_path / WEIGHTS)
    assert_close(logits(loaded), logits(peft.PeftModel.from_pretrained(model, tmp_path).eval()))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_names_of_wrapped_models_are_read(prefix, tmp_path):
    model, home = llama(), "base_model.model."
    twin = written(model, tmp_path, target_modules=Q)
    edited(tmp_path, lambda given: {home + prefix + k.removeprefix(home): v for k, v in given.items()})
    assert_close(logits(lora_fx.load(model, tmp_path)), logits(twin))


def test_model_without_values_is_refused(tmp_path):
    written(llama(), tmp_path, target_modules=Q)
    with pytest.raises(lora_fx.RefusedError, match="has no values"):
        lora_fx.load(llama().to("meta"), tmp_path)


# -- layers with more to them than their class shows


class Scaled(nn.Linear):
    """A layer with a forward of its own, as those of BitNet and of scaled FP8 are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x))


def clipped(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, result: result.clamp(-0.1, 0.1))
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [(lambda: Scaled(6, 6), "code reads its weight"), (lambda: clipped(nn.Linear(6, 6)), "a hook runs around")],
    ids=["a forward of its own", "a hook"],
)
def test_layer_to_which_peft_adds_outside_is_refused(layer, why, tmp_path):
    written(Holder(layer()), tmp_path, target_modules=["layer"])
    with pytest.raises(lora_fx.RefusedError, match=rf"layer +{why}"):
        lora_fx.load(Holder(layer()), tmp_path)


def test_module_under_two_names_is_refused(tmp_path):
    def shared() -> nn.Module:
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.Tanh(), layer)

    written(shared(), tmp_path, target_modules=["0"])
    with pytest.raises(lora_fx.RefusedError, match="several names"):
        lora_fx.load(shared(), tmp_path)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.experts)


def test_experts_of_peft_before_0_19_are_refused(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(Bank()), torch.randn(3, 2, 8)
    twin = written(model, tmp_path, target_modules=[], target_parameters=["0.experts"])
    assert_close(lora_fx.load(model, tmp_path, (x,))(x), twin(x))
    for version in ("0.18.1", None):
        edited(tmp_path, peft_version=version)
        with pytest.raises(lora_fx.AdapterMismatchError, match=r"another way since 0\.19"):
            lora_fx.load(model, tmp_path, (x,))
