"""The reference of an adapted model: its base, or a frozen adapter, on the model itself."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.integrations.trl import Reference, reference, trainer_of
from tests.support import zoo
from tests.support.around import IDS, IN_FILES, assert_close, filled, llama, logits

pytestmark = IN_FILES
RULES = {"version": 1, "rules": [{"match": {"name": "**.{q,v}_proj"}, "lora": {"r": 2, "alpha": 4, "dropout": 0.2}}]}


def test_reference_stays_the_base_in_eval_mode_while_the_model_is_trained():
    base, tuned = llama(), lora_fx.apply(llama(), RULES)
    ref = reference(tuned)
    filled(tuned).train()
    assert torch.equal(ref(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert not ref(input_ids=IDS).logits.requires_grad
    assert all(module.training for module in tuned.modules()), "the model stays in training mode"
    assert not torch.equal(logits(tuned), logits(base))
    assert lora_fx.list_adapters(tuned)["default"].active


def test_reference_has_no_parameters_and_is_the_model_in_all_else():
    tuned = lora_fx.apply(llama(), RULES)
    ref = reference(tuned)
    assert [*ref.parameters()] == [] == [*ref.children()]
    assert (ref.config, ref.base_model, ref.get_output_embeddings()) == (tuned.config, tuned.model, tuned.lm_head)
    ref.to(torch.float64).train()
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert tuned.training is False
    expected = llama().state_dict()
    state = reference(filled(tuned), trained=True).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_methods_of_a_reference_run_with_the_base_shown():
    tuned = filled(lora_fx.apply(llama(), RULES), 2.0).train()
    ref = reference(tuned, trained=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = llama().generate(IDS, **options)
    assert torch.equal(ref.generate(IDS, **options), expected)
    assert not torch.equal(tuned.eval().generate(IDS, **options), expected)


def test_threads_that_ask_a_reference_at_once_all_get_the_base():
    """One that ends first must not take eval mode, or the base, from one that runs."""
    tuned = filled(lora_fx.apply(llama(), RULES)).train()
    ref, expected, wrong = reference(tuned, trained=True), logits(llama()), []
    inside, left = threading.Event(), threading.Event()

    def first() -> None:
        with ref.shown():
            inside.set()
            assert left.wait(20)

    other = threading.Thread(target=first)
    other.start()
    assert inside.wait(20)
    with ref.shown():
        left.set()
        other.join(20)
        wrong += [module for module in tuned.modules() if module.training]
    assert wrong == []
    assert tuned.training
    inside.clear()
    left.clear()
    other = threading.Thread(target=first)
    other.start()
    assert inside.wait(20)
    found = ref.prepare_inputs_for_generation  # as a method is asked for while another thread shows the base
    assert found.__wrapped__ is not None
    left.set()
    other.join(20)
    assert torch.equal(ref(input_ids=IDS).logits, expected)


def test_forwards_that_others_put_on_a_reference_are_called_with_the_base_shown():
    tuned = filled(lora_fx.apply(llama(), RULES))
    ref = reference(tuned, trained=True)
    ref.forward = lambda ids: ref.get_output_embeddings()(ref.base_model(input_ids=ids).last_hidden_state)
    assert_close(ref(IDS), logits(llama()))


def test_copies_pickles_and_compiled_references_compute_the_base():
    tuned = filled(lora_fx.apply(llama(), RULES))
    ref = reference(tuned, trained=True)
    expected = logits(llama())
    for other in (copy.deepcopy(ref), pickle.loads(pickle.dumps(ref)), torch.compile(ref, backend="eager")):
        assert torch.equal(other(input_ids=IDS).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ref(input_ids=IDS).logits, llama()(input_ids=IDS).logits)


def test_reference_of_graph_modules_and_of_modules_trained_whole_is_the_base():
    for model, rules, x in (
        (torch.fx.symbolic_trace(zoo.Mlp()), zoo.rules("**"), (zoo.features(2, 3),)),
        (zoo.Mlp(), zoo.rules("fc1", train=["fc2"]), (zoo.features(2, 3),)),
    ):
        tuned = lora_fx.apply(copy.deepcopy(model), rules, x)
        ref = reference(tuned)
        filled(tuned)
        with torch.no_grad():
            assert torch.equal(ref(*x), model(*x))
            assert not torch.equal(tuned(*x), model(*x))


def test_adapter_that_changes_the_model_already_is_refused_by_name():
    tuned = filled(lora_fx.apply(llama(), RULES))
    with pytest.raises(RefusedError, match=r"its base is not what the training starts from\n +default +‖ΔW‖"):
        reference(tuned)
    tuned = lora_fx.apply(zoo.Mlp(), zoo.rules("fc1", train=["fc2"]), (zoo.features(2, 3),))
    with torch.no_grad():
        tuned.fc2.weight += 1
    with pytest.raises(RefusedError, match=r"fc2\.weight +is trained, and not the base's"):
        reference(tuned)
    started = {"version": 1, "rules": [{"match": {"name": "**.q_proj"}, "lora": {"r": 2, "init": "pissa"}}]}
    assert isinstance(reference(lora_fx.apply(llama(), started)), Reference)
    with pytest.raises(RefusedError, match="not adapted"):
        reference(llama())


def test_trained_rows_of_embeddings_are_seen_too():
    tuned = lora_fx.apply(llama(), RULES | {"tokens": [{"name": "**.embed_tokens", "ids": [3, 5]}]})
    assert isinstance(reference(tuned), Reference)
    rows = next(p for name, p in tuned.named_parameters() if name.endswith("rows"))
    with torch.no_grad():
        rows.add_(1)
    with pytest.raises(RefusedError, match="2 trained rows"):
        reference(tuned)


def test_frozen_adapter_is_the_reference_of_a_training_that_goes_on(tmp_path):
    tuned = filled(lora_fx.apply(llama(), RULES))
    expected = logits(tuned)
    lora_fx.save(tuned, tmp_path)
    lora_fx.add(tuned, tmp_path, adapter="start")
    lora_fx.use(tuned, "default")
    with pytest.raises(RefusedError, match=r"start.*no reference(.|\n)*requires gradients"):
        reference(tuned, adapter="start")
    for name, parameter in tuned.named_parameters():
        if ".start." in name:
            parameter.requires_grad_(False)
    with pytest.raises(RefusedError, match=r"default +is in use"):
        reference(tuned, adapter="default")
    with pytest.raises(ValueError, match="none"):
        reference(tuned, adapter="none")
    ref = reference(tuned, adapter="start")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".default." in name:
                parameter.add_(0.5)
    tuned.train()
    assert_close(ref(input_ids=IDS).logits, expected)
    assert ref.state_dict().keys() == tuned.state_dict().keys()


class Config:
    sync_ref_model = False
    beta = 0.1

    def __init__(self, **options: Any) -> None:
        vars(self).update(options)


class WithoutReference:
    def __init__(self, model: nn.Module, args: Any) -> None:
        self.model = model


class Other(WithoutReference):
    ref_model, beta = "of its own", 0.1


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        (Other, Config(sync_ref_model=True), "cannot follow the model"),
        (Other, Config(fsdp="full_shard"), "fsdp +Other shards a reference by itself"),
        (Other, Config(deepspeed={"stage": 2}), "deepspeed +Other shards"),
        (WithoutReference, Config(beta=None), "WithoutReference has none"),
        (Other, Config(), "in another way"),
    ],
)
def test_what_no_shared_reference_can_be_right_for_is_refused(kind, config, said):
    with pytest.raises(RefusedError, match=said):
        trainer_of(kind, lora_fx.apply(llama(), RULES), args=config)
    assert config.beta in (0.1, None), "it stays as it is"


def test_trainers_launched_for_shards_are_refused_and_options_with_no_place_too(monkeypatch):
    tuned = lora_fx.apply(llama(), RULES)
    with pytest.raises(TypeError, match="leave out peft_config, ref_model"):
        trainer_of(Other, tuned, args=Config(), ref_model=None, peft_config=None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RefusedError, match="fsdp"):
        trainer_of(Other, tuned, args=Config())
