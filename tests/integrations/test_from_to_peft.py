"""A model that PEFT holds becomes a twin, and a twin becomes a model that PEFT holds; both stay as they are."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import lora_fx
from lora_fx.errors import AdapterFileError, AdapterMismatchError, RefusedError
from tests.files.adapter.test_peft_forms import FORMS as IN_FILES_TOO
from tests.support.around import IDS, IN_FILES, assert_close, filled, llama, logits
from tests.support.peftkinds import Loop, each, mixtral
from tests.support.peftrows import MODELS, ROWS, Row

pytestmark = IN_FILES
REFUSALS = (RefusedError, AdapterFileError, AdapterMismatchError)


def in_peft(model: nn.Module, name: str = "default", **settings: Any) -> Any:
    """Return a copy of the model in PEFT, with values in all that it trains."""
    twin = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings), adapter_name=name)
    return with_values(twin).eval()


def with_values(twin: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return twin


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def from_row(row: Row) -> tuple[Any, nn.Module]:
    """Return the row's model in PEFT, and without."""
    torch.manual_seed(0)
    model = MODELS[row.model]().eval()
    return in_peft(model, **row.settings), model


@pytest.mark.parametrize("row", [row for row in ROWS if not row.refused], ids=lambda row: row.name)
def test_row_of_peft_is_the_same_here_and_there(row):
    theirs, model = from_row(row)
    inputs = model.inputs
    expected, before = theirs(*inputs), values(theirs)
    tuned = lora_fx.from_peft(theirs, inputs)
    assert is_same(theirs, before)
    assert_close(tuned(*inputs), expected)
    own = values(tuned)
    if row.saved_for != "PEFT":
        with pytest.raises(RefusedError, match="code reads its weight"):
            lora_fx.to_peft(tuned)
    else:
        back = lora_fx.to_peft(tuned)
        assert_close(back(*inputs), expected)
    assert is_same(tuned, own)
    base = theirs.base_model.model.lin0.base_layer if "kasa_config" in row.settings else None
    if base is not None:  # PEFT has taken parts of it away for good
        model.lin0 = base
    assert_close(lora_fx.remove(tuned)(*inputs), model(*inputs))


@pytest.mark.parametrize("row", [row for row in ROWS if row.refused], ids=lambda row: row.name)
def test_row_that_has_no_counterpart_is_refused_by_name(row):
    theirs, model = from_row(row)
    before = values(theirs)
    with pytest.raises(REFUSALS, match=row.refused):
        lora_fx.from_peft(theirs, model.inputs)
    assert is_same(theirs, before)


Q = {"target_modules": ["q_proj", "v_proj"]}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {**Q, "task_type": "CAUSAL_LM"},
    "ranks and alphas": {**Q, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 32}},
    "rank-stabilised, DoRA": {**Q, "use_rslora": True, "use_dora": True},
    "a head trained whole": {**Q, "modules_to_save": ["lm_head"]},
    "rows": {**Q, "trainable_token_indices": [3, 7]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_model_of_transformers_is_the_same_here_and_there(form):
    theirs = in_peft(llama(), **FORMS[form])
    tuned = lora_fx.from_peft(theirs)
    assert type(tuned).__name__ == "LlamaForCausalLM"
    assert_close(logits(tuned), logits(theirs))
    back = lora_fx.to_peft(tuned)
    assert isinstance(back, peft.PeftModelForCausalLM)
    assert_close(logits(back), logits(theirs))
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(input_ids=IDS, **greedy)
    assert torch.equal(tuned.generate(input_ids=IDS, **greedy), expected)
    assert torch.equal(back.generate(input_ids=IDS, **greedy), expected)


@pytest.mark.parametrize("form", IN_FILES_TOO)
def test_what_files_hold_is_held_without_them(form):
    settings = {key: value for key, value in IN_FILES_TOO[form].items() if key not in ("save", "tied")}
    theirs = in_peft(llama(IN_FILES_TOO[form].get("tied", "ensure_weight_tying" in settings)), **settings)
    before = values(theirs)
    tuned = lora_fx.from_peft(theirs)
    assert is_same(theirs, before)
    assert_close(logits(tuned), logits(theirs))
    assert_close(logits(lora_fx.to_peft(tuned)), logits(theirs))


def test_banks_of_experts_are_the_same_here_and_there():
    theirs = in_peft(mixtral().eval(), target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    tuned = lora_fx.from_peft(theirs, {"input_ids": IDS})
    assert_close(logits(tuned), logits(theirs))
    assert_close(logits(lora_fx.to_peft(tuned)), logits(theirs))


def steps(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


TRAINED = {**Q, "bias": "lora_only", "modules_to_save": ["norm"]}


def with_biases() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60, attention_bias=True)).eval()


def test_no_weight_is_copied_and_training_one_leaves_the_other_alone():
    theirs = in_peft(with_biases(), **TRAINED)
    expected = logits(theirs)
    tuned = lora_fx.from_peft(theirs)
    name = "model.layers.0.mlp.up_proj.weight"
    assert tuned.get_parameter(name).data_ptr() == theirs.base_model.model.get_parameter(name).data_ptr()
    back = lora_fx.to_peft(tuned)
    assert back.base_model.model.get_parameter(name).data_ptr() == tuned.get_parameter(name).data_ptr()
    trained = [parameter for parameter in back.parameters() if parameter.requires_grad]
    assert {tuple(p.shape) for p in trained} == {tuple(p.shape) for p in lora_fx.parameters(tuned)}
    base = lora_fx.remove(tuned)
    for model, parameters in ((tuned, [*lora_fx.parameters(tuned)]), (back, trained)):
        others = [(other, logits(other)) for other in (theirs, tuned, back, base) if other is not model]
        before = logits(model)
        steps(model, parameters)
        assert not torch.allclose(logits(model), before, atol=1e-4)
        assert all(torch.equal(logits(other), result) for other, result in others)
    assert torch.equal(logits(theirs), expected)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_mode_stays(mode):
    theirs = in_peft(llama(), **Q, lora_dropout=0.5).train(mode)
    theirs.base_model.model.model.layers[0].mlp.train(not mode)
    tuned = lora_fx.from_peft(theirs)
    back = lora_fx.to_peft(tuned)
    for model in (tuned, back.base_model.model):
        assert model.training is mode
        assert model.model.layers[0].mlp.training is not mode
        assert all(
            dropout.training is mode
            for path, module in model.named_modules()
            if path.endswith("lora_dropout")
            for dropout in module.children()
        )


def test_first_value_that_changes_the_base_is_in_the_base():
    theirs = in_peft(llama(), **Q, init_lora_weights="pissa")
    assert not torch.equal(
        theirs.base_model.model.model.layers[0].self_attn.q_proj.weight,
        llama().state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )
    assert_close(logits(lora_fx.from_peft(theirs)), logits(theirs))


def test_model_that_bears_adapters_by_itself_is_the_same_here():
    theirs = llama()
    theirs.add_adapter(peft.LoraConfig(**Q), "style")
    with_values(theirs)
    expected, before = logits(theirs), values(theirs)
    tuned = lora_fx.from_peft(theirs)
    assert is_same(theirs, before)
    assert_close(logits(tuned), expected)
    assert_close(logits(lora_fx.to_peft(tuned)), expected)
    assert {site.adapter for site in lora_fx.inspect(tuned).sites} == {"style"}
    base = lora_fx.remove(tuned)
    assert not base._hf_peft_config_loaded
    base.add_adapter(peft.LoraConfig(**Q))


def several() -> Any:
    """Two adapters, of which one site has both; the second is active."""
    theirs = in_peft(llama(), "a", **Q)
    theirs.add_adapter("b", peft.LoraConfig(target_modules=["o_proj", "v_proj"], r=3, lora_alpha=9))
    theirs.set_adapter("b")
    return with_values(theirs)


def active(theirs: Any, *names: str) -> Tensor:
    """Return what the model makes with these adapters active."""
    theirs.base_model.set_adapter([*names])
    return logits(theirs)


def test_all_adapters_come_along_and_those_are_in_use_that_are_active():
    theirs = several()
    before = values(theirs)
    tuned = lora_fx.from_peft(theirs)
    assert is_same(theirs, before)
    assert [(one.name, one.active) for one in lora_fx.list_adapters(tuned)] == [("a", False), ("b", True)]
    assert_close(logits(tuned), active(theirs, "b"))
    for names in (["a"], ["a", "b"]):
        expected = active(theirs, *names)
        with lora_fx.use(tuned, names):
            assert_close(logits(tuned), expected)
            assert_close(logits(lora_fx.to_peft(tuned)), expected)
        assert_close(logits(lora_fx.from_peft(theirs)), expected)
    back = lora_fx.to_peft(tuned)
    assert [*back.peft_config] == ["a", "b"]
    assert_close(logits(back), active(theirs, "b"))
    assert_close(active(back, "a", "b"), active(theirs, "a", "b"))


def test_one_of_several_adapters_can_be_named():
    theirs = several()
    for name in ("a", "b"):
        tuned = lora_fx.from_peft(theirs, adapter=name)
        assert [one.name for one in lora_fx.list_adapters(tuned)] == [name]
        assert_close(logits(tuned), active(theirs, name))
    with pytest.raises(RefusedError, match=r"no such adapter\n  asked for +c\n  there are +a, b"):
        lora_fx.from_peft(theirs, adapter="c")


def test_adapters_have_the_parts_of_the_model_that_they_train():
    theirs = in_peft(llama(), "a", **Q)
    theirs.add_adapter("b", peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["lm_head"]))
    with_values(theirs)
    expected = active(theirs, "a", "b")
    assert_close(logits(lora_fx.from_peft(theirs)), expected)
    expected = active(theirs, "a")
    assert_close(logits(lora_fx.from_peft(theirs)), expected)
    theirs.add_adapter("c", peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["norm"]))
    with_values(theirs)
    tuned = lora_fx.from_peft(theirs)
    for name in ("a", "b", "c"):
        expected = active(theirs, name)
        lora_fx.use(tuned, name)
        assert_close(logits(tuned), expected)


def test_weighted_and_unused_adapters_are_refused_on_the_way_there():
    tuned = lora_fx.from_peft(several())
    for choice, words in (({"a": 0.5, "b": 1}, "a +is used with the weight 0.5"), (None, "b +is not in use")):
        lora_fx.use(tuned, choice)
        with pytest.raises(RefusedError, match=words):
            lora_fx.to_peft(tuned)


def test_adapters_of_several_names_go_there_together():
    rules = {"rules": [each("**.q_proj", adapter="a"), each("**.v_proj", r=3, adapter="b")]}
    tuned = filled(lora_fx.apply(llama(), rules))
    back = lora_fx.to_peft(tuned)
    assert [*back.peft_config] == ["a", "b"]
    assert_close(logits(back), logits(tuned))


def test_what_peft_cannot_have_beside_each_other_is_refused():
    rules = {"rules": [each("**.q_proj", adapter="a", bias=True), each("**.v_proj", adapter="b", bias=True)]}
    with pytest.raises(RefusedError, match=r"cannot have 'b' beside the other adapters\n +.*only 1 adapter with bias"):
        lora_fx.to_peft(lora_fx.apply(with_biases(), rules))


def merged() -> Any:
    theirs = in_peft(llama(), **Q)
    theirs.merge_adapter()
    return theirs


def switched_off() -> Any:
    theirs = in_peft(llama(), **Q)
    theirs.base_model.disable_adapter_layers()
    return theirs


def hooked() -> Any:
    theirs = in_peft(llama(), **Q)
    theirs.base_model.model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    return theirs


def rescaled() -> Any:
    theirs = in_peft(llama(), **Q)
    theirs.base_model.model.model.layers[1].self_attn.v_proj.scale_layer(0.5)
    return theirs


STANDS_OTHERWISE = {
    r"layers\.1\.self_attn\.v_proj +is scaled by 0\.5, and alpha says 1": rescaled,
    "q_proj +its adapter is merged into the base": merged,
    "its adapter is switched off": switched_off,
    r"layers\.1\.self_attn\.q_proj +has a hook": hooked,
    r"a\-b +is no name here": lambda: in_peft(llama(), "a-b", **Q),
}


@pytest.mark.parametrize("words", STANDS_OTHERWISE)
def test_model_that_does_not_stand_as_adapted_is_refused(words):
    theirs = STANDS_OTHERWISE[words]()
    before = values(theirs)
    with pytest.raises(RefusedError, match=words):
        lora_fx.from_peft(theirs)
    assert is_same(theirs, before)


def test_another_method_is_refused_by_name():
    theirs = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterFileError, match="IA3"):
        lora_fx.from_peft(theirs)


def test_what_is_not_in_peft_is_refused():
    with pytest.raises(TypeError, match=r"must be a peft\.PeftModel or hold PEFT's layers, found LlamaForCausalLM"):
        lora_fx.from_peft(llama())
    with pytest.raises(RefusedError, match="not adapted"):
        lora_fx.to_peft(llama())


def test_both_say_that_they_need_peft(monkeypatch):
    tuned = lora_fx.apply(llama(), target=["q_proj"], r=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lambda: lora_fx.from_peft(tuned), lambda: lora_fx.to_peft(tuned)):
        with pytest.raises(ImportError, match=r"needs PEFT: pip install"):
            call()


def test_what_peft_cannot_have_is_refused_site_by_site():
    rules = {"rules": [{**each("step"), "per_call": True}, each("out")]}
    tuned = lora_fx.apply(Loop(), rules, Loop.inputs)
    before = values(tuned)
    with pytest.raises(RefusedError, match=r"step +each call has an adapter of its own"):
        lora_fx.to_peft(tuned)
    assert is_same(tuned, before)


def test_dora_beside_plain_lora_is_refused_by_name():
    tuned = lora_fx.apply(llama(), {"rules": [each("**.q_proj", dora=True), each("**.v_proj")]})
    with pytest.raises(RefusedError, match=r"layers\.0\.self_attn\.v_proj +is plain LoRA beside others that are not"):
        lora_fx.to_peft(tuned)


def test_a_name_that_peft_cannot_hold_is_refused_and_another_is_taken():
    tuned = filled(lora_fx.apply(llama(), {"rules": [each("**.q_proj", adapter="train")]}))
    with pytest.raises(RefusedError, match=r"train +is an attribute of nn\.ModuleDict.*lora_fx\.rename"):
        lora_fx.to_peft(tuned)
    lora_fx.rename(tuned, "train", "mine")
    assert_close(logits(lora_fx.to_peft(tuned)), logits(tuned))
