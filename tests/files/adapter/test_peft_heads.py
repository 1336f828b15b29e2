"""PEFT takes the heads of some tasks for trained whole: it is told of such a task only with their tensors in the file."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from torch import Tensor, nn

import lora_fx
from tests.support.around import IN_FILES, assert_close

pytestmark = IN_FILES
IDS = torch.arange(1, 13).view(2, 6)
BERT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
DISTIL: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = DISTIL if kind.startswith("Distil") else BERT
    model: nn.Module = getattr(transformers, kind)
    config = model.config_class(vocab_size=20, pad_token_id=0, **sizes)  # type: ignore[operator]
    return model(config).eval()


def first(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS)[0]
    return output


@pytest.mark.parametrize(
    ("kind", "sites", "train", "task"),
    [
        ("BertForSequenceClassification", "**.query", [], None),
        ("BertForSequenceClassification", "**.query", ["classifier"], "SEQ_CLS"),
        ("BertForSequenceClassification", "**.{query,classifier}", [], None),
        ("BertForTokenClassification", "**.query", [], None),
        ("BertForTokenClassification", "**.query", ["classifier"], "TOKEN_CLS"),
        ("BertForQuestionAnswering", "**.query", [], None),
        ("BertForQuestionAnswering", "**.query", ["qa_outputs"], "QUESTION_ANS"),
        ("DistilBertForSequenceClassification", "**.q_lin", [], None),
        ("DistilBertForSequenceClassification", "**.q_lin", ["classifier"], "SEQ_CLS"),
        ("LlamaForSequenceClassification", "**.q_proj", [], None),
        ("LlamaForSequenceClassification", "**.q_proj", ["score"], "SEQ_CLS"),
    ],
)
def test_peft_reads_adapters_of_models_with_a_head_trained_or_not(kind, sites, train, task, tmp_path):
    model = made(kind)
    rules = {"rules": [{"match": {"name": sites}, "lora": {"r": 2, "init": "random"}}]}
    tuned = lora_fx.apply(model, rules | ({"train": train} if train else {})).eval()
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.add_(0.1)
    lora_fx.save(tuned, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close(first(theirs), first(tuned))
    assert_close(first(lora_fx.load(model, tmp_path)), first(tuned))
    assert_close(first(lora_fx.to_peft(tuned)), first(tuned))
    assert_close(first(lora_fx.from_peft(theirs)), first(tuned))


def test_a_task_that_is_told_without_its_head_is_what_peft_fails_at(tmp_path):
    model = made("BertForSequenceClassification")
    tuned = lora_fx.apply(model, {"rules": [{"match": {"name": "**.query"}, "lora": {"r": 2}}]})
    lora_fx.save(tuned, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(KeyError, match="classifier"):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
