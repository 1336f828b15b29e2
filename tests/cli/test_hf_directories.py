"""hf:DIRECTORY: configurations come from others; none of them brings code along."""

import json

import pytest
from torch import nn

from lora_fx.cli.models import pretrained
from lora_fx.cli.models.pretrained import ModelSpecError, from_transformers
from lora_fx.errors import LoraFxWarning

transformers = pytest.importorskip("transformers")
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8,
}  # fmt: skip


def _directory(folder, **changes):
    content = {**BERT, **changes}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def asked(*_):
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"auto_map": {"AutoModel": "modeling.Other"}}, "auto_map"),
        ({"auto_map": {"AutoConfig": "someone/else--configuration.Other"}, "model_type": "other"}, "auto_map"),
        ({"text_config": {"auto_map": {"AutoModel": "modeling.Other"}}}, "text_config.auto_map"),
        ({"parts": [{"auto_map": {"AutoModel": "modeling.Other"}}]}, "parts.0.auto_map"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ({"_attn_implementation": "paged|someone/kernel@main:part"}, "_attn_implementation"),
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"attn_implementation": {"text_config": "someone/kernel"}}, "attn_implementation"),
        ({"experts_implementation": "someone/kernel"}, "experts_implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("weights", [False, True], ids=["configuration", "weights"])
def test_configuration_that_names_code_is_refused_with_every_key(tmp_path, monkeypatch, changes, key, weights):
    def loaded(*_, **__):
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", loaded)
    with pytest.raises(ModelSpecError, match="names code that comes from elsewhere; nothing was loaded") as refused:
        from_transformers(_directory(tmp_path, **changes), weights)
    assert f"  {key}  " in str(refused.value)


def test_all_keys_that_name_code_are_told_at_once(tmp_path):
    given = _directory(tmp_path, auto_map={"AutoModel": "a.B"}, attn_implementation="someone/kernel")
    with pytest.raises(ModelSpecError) as refused:
        from_transformers(given, weights=False)
    assert str(refused.value).count("\n  ") == 3


def test_flash_attention_is_refused_where_a_kernel_would_be_fetched_for_it(tmp_path, monkeypatch):
    installed = {"kernels"}
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: True if name in installed else None)
    given = _directory(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ModelSpecError, match="fetched from a hub"):
        from_transformers(given, weights=False)
    installed.add("flash_attn")
    with pytest.raises(ModelSpecError) as refused:  # transformers itself knows whether it really works
        from_transformers(given, weights=False)
    assert "fetched" not in str(refused.value)


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_built_in_implementations_are_taken(tmp_path, value):
    assert isinstance(from_transformers(_directory(tmp_path, attn_implementation=value), weights=False), nn.Module)


@pytest.mark.parametrize("names", [["Trainer"], ["pipeline"], ["AutoConfig"], ["nothing"], ["os"], [1], [None], []])
def test_architectures_lead_to_classes_of_models_and_to_nothing_else(tmp_path, names):
    model = from_transformers(_directory(tmp_path, architectures=names), weights=False)
    assert type(model) is transformers.BertModel


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b"1", b'{"model_type": 3}', b'{"model_type": "bert", "hidden_size": "x"}',
     b'{"a": 1, "a": 2}', b'{"model_type": "bert", "hidden_size": -1}', b'{"x": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_configuration_that_is_none_is_an_error_that_names_the_directory(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelSpecError, match=str(tmp_path)):
        from_transformers(str(tmp_path), weights=False)


def test_part_that_a_configuration_names_by_a_hub_is_not_fetched(tmp_path, monkeypatch):
    tried = []

    def resolve(host, *_, **__):
        tried.append(host)
        raise OSError("there is no network")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    changes = {
        "model_type": "vitmatte", "architectures": ["VitMatteForImageMatting"],
        "backbone": "someone/model", "use_pretrained_backbone": True, "use_timm_backbone": False,
    }  # fmt: skip
    with pytest.raises(ModelSpecError, match="cannot make this model"):
        from_transformers(_directory(tmp_path, **changes), weights=False)
    assert not tried


def test_directory_with_an_adapter_gives_no_other_model_than_the_one_that_lies_there(tmp_path):
    given = _directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ModelSpecError, match="holds an adapter"):
        from_transformers(given, weights=True)


@pytest.mark.parametrize("weights", [False, True], ids=["configuration", "weights"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_codes_whose_layers_are_refused_are_named_before_a_model_is_made(tmp_path, method, weights):
    given = _directory(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelSpecError, match=f"are codes of {method}, which gptqmodel reads.*\n  give the directory"):
        from_transformers(given, weights)


def test_a_model_without_values_says_that_its_codes_are_shown_as_plain_linears(tmp_path):
    given = _directory(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.warns(
        LoraFxWarning, match="are codes of fp8; without values they are shown, and counted, as plain ones"
    ):
        assert isinstance(from_transformers(given, weights=False), nn.Module)
