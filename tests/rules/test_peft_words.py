"""What PEFT calls otherwise is answered by name; the signatures stay as strict as they were."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from torch import nn

import lora_fx
from lora_fx.rules.peftwords import NAMES, WORDS

MODEL = nn.Sequential(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lora_fx.apply(MODEL, target="*", r=2, lora_alpha=4), {"lora_alpha": "alpha=…"}),
        (lambda: lora_fx.plan(MODEL, target_modules=["0"], lora_dropout=0.1),
         {"target_modules": "target=", "lora_dropout": "`dropout`"}),
        (lambda: lora_fx.apply(MODEL, peft_config=object(), adapter_name="a"),
         {"peft_config": "rules_from_peft", "adapter_name": "rename"}),
        (lambda: lora_fx.load(MODEL, "nowhere", r=8, lora_alpha=4), {"r": "files", "lora_alpha": "files"}),
        (lambda: lora_fx.load(MODEL, "nowhere", is_trainable=True), {"is_trainable": "not needed"}),
        (lambda: lora_fx.add(lora_fx.apply(MODEL, target="*", r=2), target="*", adapter_name="b", use_dora=True),
         {"adapter_name": "adapter=…", "use_dora": "dora: true"}),
    ],
)  # fmt: skip
def test_keywords_of_peft_are_answered(call, said):
    with pytest.raises(TypeError) as raised:
        call()
    head, *lines, end = str(raised.value).splitlines()
    assert "() does not take " in head
    assert ("reads all that" if "load()" in head else "rules_from_peft") in end
    assert [line.split()[0] for line in lines] == [*said]
    assert all(words in line for line, words in zip(lines, said.values(), strict=True))


def test_keys_of_rules_and_functions_of_peft_are_answered_too():
    for call, told in (
        (
            lambda: lora_fx.apply(MODEL, target="*", dropout=0.1, lora_alpha=4),
            "dropout     in the rules: `lora: {dropout:",
        ),
        (lambda: lora_fx.plan(MODEL, target="*", train=["0"]), "train  in the rules: `train` at the top"),
        (lambda: lora_fx.load(MODEL, "nowhere", dropout=0.1), "dropout  the adapter's files say it"),
        (lambda: lora_fx.load(MODEL, "nowhere", adapter="b"), "adapter  all are loaded"),
    ):
        with pytest.raises(TypeError, match="does not take") as raised:
            call()
        assert told in str(raised.value)
    with pytest.raises(AttributeError, match=r"get_peft_model'; lora_fx\.apply\(model, r=8"):
        lora_fx.get_peft_model  # noqa: B018
    for words in NAMES.values():
        assert callable(getattr(lora_fx, words.split(".")[1].split("(")[0]))
    assert not hasattr(lora_fx, "nothing")


def test_other_keywords_are_what_python_says_of_them_and_signatures_are_strict():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        lora_fx.apply(MODEL, target="*", rank=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        lora_fx.apply()
    for function in (lora_fx.apply, lora_fx.plan, lora_fx.load, lora_fx.add):
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_every_setting_of_peft_is_answered_everywhere():
    peft = pytest.importorskip("peft")
    settings = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    for function in (lora_fx.apply, lora_fx.plan, lora_fx.load, lora_fx.add):
        answered = {*WORDS[""], *WORDS.get(function.__name__, {}), *inspect.signature(function).parameters}
        assert settings <= answered, function.__name__


def test_a_configuration_in_the_place_of_rules_is_answered_too():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    for call in (lora_fx.apply, lora_fx.plan):
        with pytest.raises((TypeError, lora_fx.RuleError), match="rules_from_peft"):
            call(MODEL, config)
