"""PEFT puts nothing into a model that lora_fx has adapted, whichever way it is asked; and nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import lora_fx
from tests.support.twoadapters import given, model, two, values

peft = pytest.importorskip("peft")

RULES = {"version": 1, "rules": [{"match": {"name": "**.q"}, "lora": {"r": 2, "init": "random"}}]}
MODELS = {
    "modules": lambda: lora_fx.apply(model(), RULES, backend="modules"),
    "graphs": lambda: lora_fx.apply(model(), RULES, (given(),)),
    "a GraphModule": lambda: lora_fx.apply(fx.symbolic_trace(model()), RULES, (given(),)),
    "several adapters": two,
}
CONFIG = {"r": 2, "lora_alpha": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("peft")
    peft.get_peft_model(model(), peft.LoraConfig(target_modules=["k"], **CONFIG)).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapted_model_takes_no_adapters_of_peft(kind: str, folder):
    tuned = MODELS[kind]()
    out, before = tuned(given()), values(tuned)
    attributes, modules = set(vars(tuned)), list(tuned.named_modules())
    grads = {name: parameter.requires_grad for name, parameter in tuned.named_parameters()}
    for targets in (["k"], ["q"], "all-linear"):  # beside ours, around ours
        config = peft.LoraConfig(target_modules=targets, **CONFIG)
        ways = {
            "get_peft_model": lambda config=config: peft.get_peft_model(tuned, config),
            "mixed": lambda config=config: peft.get_peft_model(tuned, config, mixed=True),
            "PeftModel": lambda config=config: peft.PeftModel(tuned, config),
            "inject": lambda config=config: peft.inject_adapter_in_model(config, tuned),
            "from_pretrained": lambda: peft.PeftModel.from_pretrained(tuned, folder),
            "IA3": lambda: peft.get_peft_model(tuned, peft.IA3Config(target_modules=["k"], feedforward_modules=[])),
        }
        for way, inject in ways.items():
            with pytest.raises(lora_fx.RefusedError, match=r"lora_fx\.add\(tuned"):
                inject()
            assert list(tuned.named_modules()) == modules, way
    assert set(vars(tuned)) == attributes
    assert {name: parameter.requires_grad for name, parameter in tuned.named_parameters()} == grads
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    assert torch.equal(tuned(given()), out)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT asks transformers by its old name
def test_prompts_of_peft_go_before_an_adapted_model_which_is_given_to_us_without_them():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    rules = {"version": 1, "rules": [{"match": {"name": "**.q_proj"}, "lora": {"r": 2, "init": "random"}}]}
    tuned = lora_fx.apply(llama, rules, backend="modules").eval()
    ids = torch.arange(6).view(2, 3)
    alone = tuned(ids).logits
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    around = peft.get_peft_model(tuned, prompts).eval()
    assert around(ids).logits.shape == (2, 5, 20)
    assert torch.equal(tuned(ids).logits, alone)
    for function in (lora_fx.merge, lora_fx.remove, lora_fx.inspect):
        with pytest.raises(lora_fx.RefusedError, match="PEFT holds this model"):
            function(around)


def test_what_is_advised_instead_works(folder):
    tuned = MODELS["modules"]()
    config = peft.LoraConfig(target_modules=["k"], **CONFIG)
    lora_fx.add(tuned, lora_fx.rules_from_peft(config), adapter="b")
    lora_fx.add(tuned, folder, adapter="c")
    assert [adapter.name for adapter in lora_fx.list_adapters(tuned)] == ["default", "b", "c"]
    theirs = lora_fx.to_peft(MODELS["modules"]())
    theirs.add_adapter("more", config)
    assert "more" in theirs.peft_config
    plain = peft.get_peft_model(lora_fx.remove(tuned), config)  # a base without adapters is PEFT's to take
    merged = peft.get_peft_model(lora_fx.merge(tuned), config)
    assert plain(given()).shape == merged(given()).shape
