"""Rules made of a configuration of PEFT's choose the sites that PEFT chooses, or say why there are none."""

from __future__ import annotations

import contextlib
import functools
import json
import sys

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

import lora_fx
from lora_fx.errors import AdapterFileError, LoraFxError, RefusedError, RuleError
from lora_fx.planning.draft.peftdefaults import DEFAULT_TARGETS
from tests.support import zoo
from tests.support.around import IDS, OF_OTHERS, llama, logits
from tests.support.peftchoices import drawn, of_peft, of_rules
from tests.support.peftkinds import gpt2, mixtral
from tests.support.peftrows import MODELS

pytestmark = pytest.mark.filterwarnings(*OF_OTHERS)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)


KINDS = {
    "llama": llama,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "own": zoo.Encoder,
    "torch's attention": encoder,
    "attention": MODELS["MHA"],
    "embedding": MODELS["EmbConv1D"],
}


@functools.cache
def made(kind: str) -> nn.Module:
    return KINDS[kind]()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(2)
def test_rules_choose_what_peft_chooses_or_both_refuse(kind, seed):
    model, config = made(kind), drawn(seed, made(kind))
    try:
        expected = of_peft(model, config)
    except ValueError:
        with pytest.raises(LoraFxError):
            lora_fx.rules_from_peft(config, model)
        return
    if {"lm_head", "transformer.wte"} <= expected[1] and not config.ensure_weight_tying:
        with pytest.raises(RefusedError, match="PEFT trains a copy of each"):
            lora_fx.rules_from_peft(config, model)
        return
    sites, whole = of_rules(model, lora_fx.rules_from_peft(config, model))
    outermost = {path for path in expected[1] if not any(path.startswith(f"{other}.") for other in expected[1])}
    assert (sites, whole) == (expected[0], outermost)
    with contextlib.suppress(RefusedError):  # names alone do not tell
        assert of_rules(model, lora_fx.rules_from_peft(config), strict=False) == (sites, whole)


@pytest.mark.parametrize(
    "expression",
    [r"^.*\.(q|v)_proj$", r".*(?:q_proj)$", "^model.layers.1.self_attn.q_proj", r".*\.q_proj|.*\.1\..*v_proj$"],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_anchors_of_an_expression_say_nothing(expression, with_model):
    model, config = llama(), peft.LoraConfig(r=2, target_modules=expression)
    rules = lora_fx.rules_from_peft(config, model if with_model else None)
    assert of_rules(model, rules, strict=False) == of_peft(model, config)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["convolution"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layer\.[02]\.convolution", "rank_pattern": {r"stages\.0\..*": 5}},
        {"target_modules": ["convolution"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["convolution"], "exclude_modules": ["shortcut.convolution"], "use_dora": True},
        {"target_modules": ["classifier.1"], "modules_to_save": ["normalization"]},
    ],
    ids=str,
)
def test_models_of_images_without_input_embeddings_are_read_as_well(settings):
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "num_labels": 3}
    model, config = ResNetForImageClassification(ResNetConfig(**sizes)), peft.LoraConfig(r=4, **settings)
    assert of_rules(model, lora_fx.rules_from_peft(config, model)) == of_peft(model, config)


def test_targets_of_every_model_type_are_those_of_peft():
    assert DEFAULT_TARGETS == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_configuration_without_targets_means_those_of_the_model_type(kind):
    config = peft.LoraConfig()
    try:
        expected = of_peft(made(kind), config)
    except ValueError:  # of what PEFT makes of a mixture of experts, no target is left
        with pytest.raises(RefusedError, match=r"has no target_modules|nothing to adapt"):
            lora_fx.rules_from_peft(config, made(kind))
    else:
        assert of_rules(made(kind), lora_fx.rules_from_peft(config, made(kind))) == expected


@pytest.mark.parametrize("targets", ["all-linear", ["w1", "w2", "w3"], ["gate", "q_proj"], r".*\.(q_proj|w2)"], ids=str)
def test_linears_that_became_banks_are_found_there_as_peft_finds_them(targets):
    config = peft.LoraConfig(target_modules=targets)
    assert of_rules(mixtral(), lora_fx.rules_from_peft(config, mixtral())) == of_peft(mixtral(), config)


def test_banks_need_peft_for_names_that_it_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RefusedError, match=r"w1 +may be in a bank(.|\n)*install peft"):
        lora_fx.rules_from_peft({"target_modules": ["w1", "w2", "w3"]}, mixtral())
    assert lora_fx.rules_from_peft({"target_modules": ["q_proj"]}, mixtral())["rules"]


def test_classifier_is_trained_as_its_task_says():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=60, pad_token_id=0))
    for targets in (["q_proj"], "all-linear"):
        config = peft.LoraConfig(target_modules=targets, task_type="SEQ_CLS")
        rules = lora_fx.rules_from_peft(config, model)
        assert of_rules(model, rules) == of_peft(model, config)
        assert rules["train"] == ["**.score"]


def test_rules_read_well_and_can_be_written():
    config = peft.LoraConfig(
        r=4,
        lora_alpha=32,
        lora_dropout=0.1,
        use_rslora=True,
        bias="lora_only",
        init_lora_weights="gaussian",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["layers.0.self_attn.q_proj"],
        rank_pattern={"v_proj": 2},
        modules_to_save=["lm_head"],
    )
    rules = lora_fx.rules_from_peft(config, llama())
    assert rules == {
        "version": 1,
        "defaults": {"r": 4, "alpha": 32, "dropout": 0.1, "rslora": True, "bias": True, "init": "gaussian"},
        "rules": [
            {
                "name": "exclude_modules",
                "match": {"name": ["**.layers.0.self_attn.q_proj"]},
                "skip": "is one of exclude_modules",
                "expect": "any",
            },
            {"name": "r 2: **.v_proj", "match": {"name": ["**.v_proj"]}, "lora": {"r": 2}, "expect": "any"},
            {"name": "target_modules", "match": {"name": ["**.q_proj", "**.v_proj"]}},
        ],
        "train": ["**.lm_head"],
    }
    plan = lora_fx.plan(llama(), yaml.safe_load(yaml.safe_dump(rules)))
    assert [(site.path[-24:], site.lora.r) for site in plan.adapted] == [
        ("ayers.0.self_attn.v_proj", 2),
        ("ayers.1.self_attn.q_proj", 4),
        ("ayers.1.self_attn.v_proj", 2),
    ]


def test_every_linear_is_named_shortly():
    rules = lora_fx.rules_from_peft(peft.LoraConfig(target_modules="all-linear"), llama())
    names = rules["rules"][0]["match"]["name"]
    assert names == [f"**.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def test_configuration_comes_as_object_dict_file_or_directory(tmp_path, monkeypatch):
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    config.save_pretrained(tmp_path)
    expected = lora_fx.rules_from_peft(config)
    monkeypatch.setitem(sys.modules, "peft", None)
    file = tmp_path / "adapter_config.json"
    for given in (config.to_dict(), json.loads(file.read_text()), tmp_path, str(tmp_path), file):
        assert lora_fx.rules_from_peft(given) == expected
    assert lora_fx.rules_from_peft({"r": 3, "target_modules": ["v_proj", "q_proj"]})["defaults"] == {"r": 3, "alpha": 8}


NEEDS_MODEL = {
    "target_modules": {},
    "'all-linear'": {"target_modules": "all-linear"},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "number of a layer": {"target_modules": ["0.q_proj"], "layers_to_transform": [1]},
    "is an expression": {"target_modules": ["q_proj"], "rank_pattern": {".*q_proj": 2}},
    "beside an expression": {"target_modules": ".*q_proj", "rank_pattern": {"q_proj": 2}},
    "look-around": {"target_modules": "(?!x).*q_proj"},
    "ensure_weight_tying": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("words", NEEDS_MODEL)
def test_what_depends_on_the_model_asks_for_it(words):
    with pytest.raises(RefusedError, match=f"depends on the model(.|\n)*{words}(.|\n)*give the model too"):
        lora_fx.rules_from_peft(NEEDS_MODEL[words])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:You have requested ensure_weight_tying:UserWarning")
def test_what_is_trained_whole_and_tied_takes_the_step_that_peft_takes(saved, tied):
    config = peft.LoraConfig(**Q, modules_to_save=saved, ensure_weight_tying=True)
    rules = lora_fx.rules_from_peft(config, llama(tied))
    models = [lora_fx.apply(llama(tied), rules), peft.get_peft_model(llama(tied), config).eval()]
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.grad = None  # first values of A are drawn
        optimizer.step()
    torch.testing.assert_close(*map(logits, models))


def test_tied_modules_of_which_peft_trains_a_copy_each_are_refused():
    both = {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}
    with pytest.raises(RefusedError, match=r"lm_head +is tied to model.embed_tokens, and PEFT trains a copy of each"):
        lora_fx.rules_from_peft(both, llama(True))
    assert lora_fx.rules_from_peft(both, llama(False))["train"] == ["**.embed_tokens", "**.lm_head"]


Q = {"target_modules": ["q_proj"]}
REFUSED = {
    "VeLoRA": peft.LoraConfig(**Q, velora_config=peft.VeloraConfig()),
    "MonteCLoRA": peft.LoraConfig(**Q, monteclora_config=peft.MontecloraConfig()),
    "KaSA": peft.LoraConfig(**Q, kasa_config=peft.KasaConfig()),
    "'mica'": peft.LoraConfig(**Q, init_lora_weights="mica"),
    "'corda'": {**Q, "init_lora_weights": "corda"},
    "layer replication": peft.LoraConfig(**Q, layer_replication=[(0, 1)]),
    "one adapter for embed_tokens": peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "an integer above 0": {**Q, "r": 0},
    "not the configuration of a LoRA": peft.IA3Config(**Q, feedforward_modules=[]),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_rule_can_say_is_refused_by_name(words):
    with pytest.raises((RefusedError, AdapterFileError), match=words):
        lora_fx.rules_from_peft(REFUSED[words])


def test_everything_that_no_rule_can_say_is_told_at_once():
    config = peft.LoraConfig(**Q, lora_bias=True, velora_config=peft.VeloraConfig())
    with pytest.raises(RefusedError, match=r"VeLoRA(.|\n)*lora_bias"):
        lora_fx.rules_from_peft(config)


UNFIT = {
    "which PEFT does not adapt": {"target_modules": ["self_attn", "q_proj"]},
    "find nothing to adapt": {"target_modules": ["c_attn"]},
    "adapt it, and train it whole": {"target_modules": ["q_proj"], "modules_to_save": ["_proj"]},
    "PEFT has none for this model": {},
}


@pytest.mark.parametrize("words", UNFIT)
def test_what_peft_would_refuse_in_the_model_is_refused(words):
    model = llama() if UNFIT[words] else zoo.Encoder()
    with pytest.raises(RefusedError, match=words):
        lora_fx.rules_from_peft(UNFIT[words], model)


def test_module_under_two_names_is_refused():
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    with pytest.raises(RefusedError, match=r"first +is also second: PEFT would adapt it under one of its names only"):
        lora_fx.rules_from_peft({"target_modules": ["first"]}, model)


def test_grouped_convolution_is_named_since_its_adapter_is_another():
    model = MODELS["Conv2dGroups"]()
    with pytest.warns(lora_fx.LoraFxWarning, match="conv2d: PEFT mixes the groups of the convolution"):
        rules = lora_fx.rules_from_peft({"target_modules": ["conv2d"]}, model)
    assert [*of_rules(model, rules)[0]] == ["conv2d.weight"]


def test_what_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(RuleError, match=r"must be a peft\.LoraConfig, a dict or a path, not int"):
        lora_fx.rules_from_peft(3)
    with pytest.raises(AdapterFileError, match="does not exist"):
        lora_fx.rules_from_peft(tmp_path)


def test_model_stays_unchanged_and_needs_no_weights():
    with torch.device("meta"):
        model = zoo.Encoder()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    rules = lora_fx.rules_from_peft({"target_modules": ["query"]}, model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert [name for rule in rules["rules"] for name in rule["match"]["name"]] == ["**.query"]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_first_values_that_are_parts_of_the_weight_have_the_same_names(init):
    rules = lora_fx.rules_from_peft(peft.LoraConfig(**Q, init_lora_weights=init), llama())
    assert rules["defaults"]["init"] == init
