"""What trainers call on an adapted transformers model writes the adapter, or is refused."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel

import lora_fx
from tests.support.around import IDS, assert_close, filled, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # transformers' and PEFT's own
RULES = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": 2, "alpha": 4}}]}


@functools.cache
def _applied(tied: bool) -> PreTrainedModel:
    return lora_fx.apply(llama(tied), RULES)


def adapted(tied: bool = False, **rules: Any) -> PreTrainedModel:
    return filled(lora_fx.apply(llama(tied), RULES | rules) if rules else copy.deepcopy(_applied(tied)))


def test_save_pretrained_writes_what_load_and_peft_read(tmp_path):
    peft = pytest.importorskip("peft")
    tuned = adapted()
    tuned.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists(), "it is no whole model"
    assert_close(logits(lora_fx.load(llama(), tmp_path)), logits(tuned))
    assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(tuned))


def test_peft_finds_the_base_and_the_class_by_itself(tmp_path):
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    tuned = filled(lora_fx.apply(LlamaForCausalLM.from_pretrained(tmp_path / "base").eval(), RULES))
    tuned.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "base"))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_close(logits(loaded), logits(tuned))


def test_every_process_but_the_first_writes_nothing(tmp_path):
    adapted().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_values_that_a_trainer_has_gathered_are_written(tmp_path):
    tuned = adapted()
    expected = logits(tuned)
    gathered = {name: value.clone() for name, value in tuned.state_dict().items()}
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.zero_()
    tuned.save_pretrained(tmp_path, state_dict=gathered)
    resumed = load_file(tmp_path / "model.safetensors")
    assert resumed.keys() == {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, gathered[name]) for name, value in resumed.items())
    assert_close(logits(lora_fx.load(llama(), tmp_path)), expected)
    assert not any(parameter.any() for parameter in lora_fx.parameters(tuned)), "the model keeps its own"


def test_push_to_hub_while_saving_is_refused(tmp_path):
    with pytest.raises(lora_fx.RefusedError, match="upload_folder"):
        adapted().save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_partitioned_factors_are_refused(tmp_path):
    """ZeRO-3 leaves parameters of shape [0] outside of a forward."""
    tuned = adapted()
    tuned.lm_head.lora_A["default"].weight.data = torch.empty(0)
    with pytest.raises(lora_fx.AdapterFileError, match=r"lm_head +\[0\]"):
        tuned.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_resizing_embeddings_is_refused_and_the_same_size_is_none():
    tuned = adapted()
    before = logits(tuned)
    assert tuned.resize_token_embeddings(60) is tuned.get_input_embeddings()
    with pytest.raises(lora_fx.RefusedError, match="with an adapter cannot be resized"):
        tuned.resize_token_embeddings(64)
    assert torch.equal(logits(tuned), before)


@pytest.mark.parametrize("name", ["add_adapter", "load_adapter", "set_adapter", "disable_adapters", "delete_adapter"])
def test_adapters_of_peft_are_refused_on_a_twin(name):
    tuned = adapted()
    with pytest.raises(lora_fx.RefusedError, match=f"{name} handles adapters of PEFT"):
        getattr(tuned, name)("default")
    with pytest.raises(lora_fx.RefusedError, match="adapter_names"):
        tuned(input_ids=IDS, adapter_names=["default"])


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("add_adapter", "lora_fx.add("),
        ("load_adapter", "lora_fx.add("),
        ("set_adapter", "lora_fx.use("),
        ("delete_adapter", "lora_fx.drop("),
        ("active_adapters", "lora_fx.list_adapters("),
    ],
)
def test_refusal_of_a_method_for_peft_says_what_to_call_here(name, instead):
    with pytest.raises(lora_fx.RefusedError) as refused:
        getattr(adapted(), name)()
    assert instead in str(refused.value)


def test_plain_models_that_come_back_have_the_class_and_its_methods(tmp_path):
    tuned = adapted()
    for plain in (lora_fx.merge(tuned), lora_fx.remove(tuned)):
        assert type(plain) is LlamaForCausalLM
        plain.save_pretrained(tmp_path)
        assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(plain))
        plain.resize_token_embeddings(64, mean_resizing=False)
    assert isinstance(tuned, LlamaForCausalLM)
    assert type(tuned).__name__ == "LlamaForCausalLM"


def test_factors_that_accelerate_has_offloaded_are_written(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    tuned = adapted()
    before = logits(tuned)
    accelerate.cpu_offload(tuned, execution_device="cpu")
    tuned.save_pretrained(tmp_path)
    assert_close(logits(lora_fx.load(llama(), tmp_path)), before)


def test_copies_of_a_twin_save_the_adapter_too(tmp_path):
    tuned = adapted()
    copy.deepcopy(tuned).save_pretrained(tmp_path)
    assert_close(logits(lora_fx.load(llama(), tmp_path)), logits(tuned))


@pytest.mark.parametrize("train", [["lm_head", "model.embed_tokens"], ["lm_head"]], ids=str)
def test_merged_head_that_was_tied_is_read_back_apart(train, tmp_path):
    tuned = adapted(tied=True, rules=[{"match": {"name": "**.q_proj"}, "lora": {"r": 2}}], train=train)
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach() * 2)
    merged = lora_fx.merge(tuned)
    assert_close(logits(merged), logits(tuned))
    merged.save_pretrained(tmp_path)
    assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


# -- models inside of the twin, and models of other libraries that save themselves


class Holder(nn.Module):
    """A module of anybody's, with a transformers model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.score = llama(), nn.Linear(60, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.inner(input_ids=ids).logits)


def held() -> nn.Module:
    torch.manual_seed(0)
    return filled(lora_fx.apply(Holder().eval(), RULES, (IDS,))).inner


def tokens_alone() -> nn.Module:
    return adapted(rules=[{"match": {"name": "**.embed_tokens"}, "lora": {"r": 2}}]).model


def tokens_trained() -> nn.Module:
    return adapted(train=["model.embed_tokens"]).model


@pytest.mark.parametrize("part", [lambda: adapted().model, held], ids=["of a transformers model", "of another"])
def test_part_is_not_saved_as_if_it_were_its_base(part, tmp_path):
    with pytest.raises(lora_fx.RefusedError, match="save_pretrained of a part of an adapted model"):
        part().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [tokens_alone, tokens_trained, held])
def test_embeddings_of_a_part_that_are_trained_cannot_be_resized(part):
    with pytest.raises(lora_fx.RefusedError, match="with an adapter cannot be resized"):
        part().resize_token_embeddings(64)


def test_parts_of_plain_models_are_plain(tmp_path):
    tuned = adapted()
    for plain in (lora_fx.merge(tuned), lora_fx.remove(tuned)):
        assert type(plain.model) is LlamaModel
        plain.model.save_pretrained(tmp_path)
        read = LlamaModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(read(IDS).last_hidden_state, plain.model(IDS).last_hidden_state)


def test_part_does_not_stand_for_the_whole(tmp_path):
    part = adapted(train=["model.norm"]).model
    with pytest.raises(lora_fx.RefusedError, match="not the whole adapted model"):
        lora_fx.save(part, tmp_path)


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def of_the_hub() -> nn.Module:
    mixin = pytest.importorskip("huggingface_hub").PyTorchModelHubMixin
    return type("HubNet", (Net, mixin), {})(width=6)


def of_diffusers() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return type("DiffusersNet", (Net, diffusers.ModelMixin, diffusers.ConfigMixin), {})()


@pytest.mark.parametrize("make", [of_the_hub, of_diffusers])
def test_model_of_another_library_writes_the_adapter_alone(make, tmp_path):
    torch.manual_seed(0)
    base, x = make().eval(), torch.randn(3, 6)
    tuned = filled(lora_fx.apply(base, RULES, (x,)))
    tuned.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_close(lora_fx.load(base, tmp_path)(x), tuned(x))
    assert type(lora_fx.merge(tuned)) is type(base)
