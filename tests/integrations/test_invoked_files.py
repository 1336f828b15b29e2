"""aLoRA goes to PEFT and comes from it: by files, by models, by configurations; formats without it refuse it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from lora_fx.errors import AdapterFileError, AdapterMismatchError, ExportError, MergeError, RefusedError, RuleError
from lora_fx.files.adapter.contents import contents_of
from tests.support.around import OF_OTHERS
from tests.support.invoked import INVOCATION, NAMES, TARGETS, in_peft, invoked, llama, prompts, rules

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*OF_OTHERS)
GIVEN = {"input_ids": prompts()}
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**GIVEN).logits


def changed(folder: Path, **settings: Any) -> Path:
    """Write other settings into the configuration of an adapter."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def test_a_file_of_ours_is_read_back_and_by_peft(tmp_path):
    tuned = invoked()
    lora_fx.save(tuned, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alora_invocation_tokens"] == INVOCATION
    assert_close(logits(lora_fx.load(llama(), tmp_path)), logits(tuned), **CLOSE)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_close(logits(theirs), logits(tuned), **CLOSE)


def test_a_file_of_pefts_is_read(tmp_path):
    theirs = in_peft(llama())
    theirs.save_pretrained(tmp_path)
    tuned = lora_fx.load(llama(), tmp_path, GIVEN)
    assert_close(logits(tuned), logits(theirs), **CLOSE)
    assert "acts from tokens 7, 5, 9 on (aLoRA)" in str(contents_of(tmp_path))


def test_added_beside_another_it_keeps_its_invocation(tmp_path):
    lora_fx.save(invoked(), tmp_path)
    tuned = lora_fx.apply(llama(), rules(None), backend="modules")
    lora_fx.add(tuned, tmp_path, adapter="b")
    lora_fx.use(tuned, "b")
    assert torch.equal(logits(tuned), logits(invoked()))
    lora_fx.save(tuned, tmp_path / "both")
    again = lora_fx.load(llama(), tmp_path / "both")
    lora_fx.use(again, "b")
    assert_close(logits(again), logits(tuned), **CLOSE)


def test_models_go_to_peft_and_come_from_there():
    theirs = in_peft(llama())
    ours = lora_fx.from_peft(theirs, GIVEN)
    assert_close(logits(ours), logits(theirs), **CLOSE)
    back = lora_fx.to_peft(ours)
    assert back.peft_config["default"].alora_invocation_tokens == INVOCATION
    assert_close(logits(back), logits(ours), **CLOSE)


def test_a_configuration_becomes_rules_with_the_invocation():
    config = peft.LoraConfig(r=4, target_modules=TARGETS, alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")
    for found in (lora_fx.rules_from_peft(config), lora_fx.rules_from_peft(config, llama())):
        assert found["defaults"]["invocation"] == INVOCATION
        plan = lora_fx.plan(llama(), found)
        assert {site.lora.invocation for site in plan.adapted if site.lora} == {tuple(INVOCATION)}


def test_what_acts_on_every_token_beside_is_refused_by_name(tmp_path):
    lora_fx.save(invoked(), tmp_path)
    for key, value in (("modules_to_save", ["lm_head"]), ("use_dora", True)):
        with pytest.raises(AdapterFileError, match=f"{key}.*beside alora_invocation_tokens"):
            lora_fx.load(llama(), changed(tmp_path, **{key: value}))
        changed(tmp_path, **{key: None if key == "modules_to_save" else False})


@pytest.mark.parametrize("value", ["7", [7, -1], [7, "5"], [[7]], [7.5], [True], 7])
def test_tokens_that_are_none_are_refused(tmp_path, value):
    lora_fx.save(invoked(), tmp_path)
    with pytest.raises(AdapterFileError, match=r"alora_invocation_tokens\s+must be a list of integers"):
        lora_fx.load(llama(), changed(tmp_path, alora_invocation_tokens=value))


@pytest.mark.parametrize("value", [None, [], [7, 5]])
def test_a_configuration_that_contradicts_the_header_is_refused(tmp_path, value):
    lora_fx.save(invoked(), tmp_path)
    with pytest.raises(AdapterFileError, match=r"contradicts adapter_config\.json"):
        lora_fx.load(llama(), changed(tmp_path, alora_invocation_tokens=value))


def test_an_empty_list_in_a_file_of_pefts_means_every_token(tmp_path):
    theirs = in_peft(llama(), invocation=None)
    theirs.save_pretrained(tmp_path)
    tuned = lora_fx.load(llama(), changed(tmp_path, alora_invocation_tokens=[]))
    assert_close(logits(tuned), logits(theirs), **CLOSE)


def test_values_with_another_invocation_are_not_swapped_in(tmp_path):
    lora_fx.save(lora_fx.apply(llama(), rules([7, 5]), backend="modules"), tmp_path)
    with pytest.raises(AdapterMismatchError, match="acts from tokens 7, 5 on"):
        lora_fx.swap(invoked(), tmp_path, adapter="default")


def test_a_model_that_peft_looks_for_no_invocation_in_is_refused(tmp_path):
    model = nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 8))
    tuned = lora_fx.apply(model, rules(name="1"), backend="modules")
    with pytest.raises(RefusedError, match="causal language models alone"):
        lora_fx.to_peft(tuned)
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(model, tmp_path)
    assert torch.equal(loaded(prompts()), tuned(prompts()))
    with pytest.raises(ValueError, match="lora_fx"):
        peft.PeftModel.from_pretrained(model, tmp_path)


def test_checkpoints_are_not_merged_with_it(tmp_path):
    lora_fx.save(invoked(), tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match="acts from its invocation on"):
        lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["merged", "vllm", "onnx", "gguf", "diffusers", "kohya", "mlx", "pt2", "executorch"])
def test_formats_without_invocations_refuse_it(tmp_path, target):
    with pytest.raises(ExportError, match="cannot express this adapter"):
        lora_fx.export(invoked(), tmp_path / "out", target=target, example_inputs=GIVEN)
    assert not (tmp_path / "out").exists()


def test_pefts_format_has_it_and_peft_computes_the_same(tmp_path):
    exported = lora_fx.export(invoked(), tmp_path / "out", target="peft", example_inputs=GIVEN, verify=True)
    assert exported.difference < 1e-5 < exported.effect


# -- rules


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"invocation": []}, "invocation is an empty list"),
        ({"invocation": 7}, "invocation must be a list"),
        ({"invocation": [7, "5"]}, "a token of invocation must be an integer"),
        ({"invocation": [-1]}, "a token of invocation must be at least 0"),
        ({"invocation": [7], "dora": True}, "cannot have 'dora'"),
        ({"invocation": [7], "bias": True}, "cannot have 'bias'"),
        ({"alora_invocation_tokens": [7]}, "here it is called 'invocation'"),
    ],
)
def test_rules_that_cannot_be_are_refused(lora, message):
    with pytest.raises(RuleError, match=message):
        lora_fx.plan(llama(), {"version": 1, "rules": [{"match": {"name": NAMES}, "lora": lora}]})


def test_an_adapter_has_one_invocation():
    two = [
        {"match": {"name": "**.q_proj"}, "lora": {"invocation": [7]}},
        {"match": {"name": "**.v_proj"}, "lora": {"invocation": [8]}},
    ]
    with pytest.raises(RuleError, match="has another invocation here"):
        lora_fx.plan(llama(), {"version": 1, "rules": two})


def test_modules_trained_whole_act_on_every_token():
    for key, value in (("train", ["lm_head"]), ("tokens", [{"ids": [3]}])):
        with pytest.raises(RuleError, match=f"trained by `{key}:` acts on every token"):
            lora_fx.plan(llama(), {**rules(), key: value})


def test_a_plan_keeps_the_invocation():
    plan = lora_fx.plan(llama(), rules())
    again = lora_fx.Plan.from_json(plan.to_json())
    assert again.sites == plan.sites
    base = llama()
    torch.manual_seed(1)
    assert_close(logits(lora_fx.apply(base, again, backend="modules")), logits(invoked()), **CLOSE)
