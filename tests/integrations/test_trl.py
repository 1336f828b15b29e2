"""TRL's trainers with an adapted model: what they log is what they log with PEFT's, and no second base is loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

import peft
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental import online_dpo
from trl.trainer import base_trainer

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.integrations.trl import Reference, trainer_of
from tests.support.preferences import decoder, logged, pairs, prompts, reward, settings, tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of TRL itself
PEFT = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FROM_PROMPTS = {"num_generations": 4, "max_completion_length": 6}


@pytest.fixture(autouse=True)
def no_loaded_models(monkeypatch):
    """Let nothing be loaded by a path, or be sent anywhere."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a second model is loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *_, **__: None)


def labelled() -> Any:
    data = pairs().to_dict()
    return type(pairs()).from_dict({
        "prompt": data["prompt"], "completion": data["chosen"], "label": [True, False, True, False],
    })  # fmt: skip


def logs_of_both(kind: Any, config: Any, folder: Any, data: Any, size: int = 2, **options: Any) -> tuple[Any, Any, Any]:
    """Return the trainer of an adapted model and both logs: PEFT's, and that trainer's, from the same A."""
    more = {"reward_funcs": reward} if kind in (GRPOTrainer, RLOOTrainer, online_dpo.OnlineDPOTrainer) else {}
    dropout = options.pop("dropout", 0.0)
    torch.manual_seed(1)
    start = peft.get_peft_model(decoder(), peft.LoraConfig(**PEFT, lora_dropout=dropout))
    theirs = kind(
        decoder(), args=settings(config, folder / "peft", size, **options), processing_class=tokenizer(),
        train_dataset=data, peft_config=peft.LoraConfig(**PEFT, lora_dropout=dropout), **more,
    )  # fmt: skip
    peft.set_peft_model_state_dict(theirs.model, copy.deepcopy(peft.get_peft_model_state_dict(start)))
    theirs.train()
    tuned = lora_fx.from_peft(start)
    arguments = settings(config, folder / "own", size, **options)
    ours = trainer_of(kind, tuned, args=arguments, processing_class=tokenizer(), train_dataset=data, **more)
    ours.train()
    return ours, logged(theirs), logged(ours)


def assert_alike(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Assert that two logs have the same numbers: losses, rewards, log-probabilities, lengths of gradients."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_dpo_logs_what_it_logs_with_peft(tmp_path):
    ours, expected, found = logs_of_both(DPOTrainer, DPOConfig, tmp_path, pairs())
    assert_alike(found, expected)
    assert {"loss", "rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected"} <= found[0].keys()
    assert isinstance(ours.ref_model, Reference)
    assert found[-2]["rewards/margins"] != 0, "the reference is not the model that is trained"


def test_comparison_of_logs_fails_where_the_reference_is_the_trained_model(tmp_path):
    _, expected, found = logs_of_both(DPOTrainer, DPOConfig, tmp_path, pairs())
    found[2]["rewards/chosen"] = 0.0
    with pytest.raises(AssertionError):
        assert_alike(found, expected)


def test_dpo_with_dropout_precomputed_references_and_checkpointing_logs_what_it_logs_with_peft(tmp_path):
    for number, options in enumerate(({"precompute_ref_log_probs": True}, {"gradient_checkpointing": False})):
        _, expected, found = logs_of_both(
            DPOTrainer, DPOConfig, tmp_path / str(number), pairs(), dropout=0.3, **options
        )
        assert_alike(found, expected)  # DPO switches dropout off


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_from_prompts_log_what_they_log_with_peft(kind, config, tmp_path):
    ours, expected, found = logs_of_both(kind, config, tmp_path, prompts(), size=4, beta=0.1, **FROM_PROMPTS)
    assert_alike(found, expected)
    assert any(line.get("kl") for line in found), "the model has left its reference"
    assert isinstance(ours.ref_model, Reference)
    assert (ours.beta, ours.args.beta) == (0.1, 0.1)


def test_grpo_without_a_reference_has_none(tmp_path):
    ours, expected, found = logs_of_both(GRPOTrainer, GRPOConfig, tmp_path, prompts(), size=4, **FROM_PROMPTS)
    assert_alike(found, expected)
    assert ours.ref_model is None


def test_kto_logs_what_it_logs_with_peft(tmp_path):
    _, expected, found = logs_of_both(KTOTrainer, KTOConfig, tmp_path, labelled())
    assert_alike(found, expected)


def test_online_dpo_logs_what_it_logs_with_peft(tmp_path, monkeypatch):
    """With PEFT the reference is the adapter switched off; of any other model TRL would copy all of it."""
    monkeypatch.setattr(online_dpo.online_dpo_trainer, "create_reference_model", None)
    ours, expected, found = logs_of_both(
        online_dpo.OnlineDPOTrainer, online_dpo.OnlineDPOConfig, tmp_path, prompts(), max_new_tokens=6, dropout=0.3
    )
    assert_alike(found, expected)
    assert isinstance(ours.ref_model, Reference)
    assert found[-2]["rewards/margins"] != 0 != found[-2]["objective/kl"], "the model has left its reference"


def test_reference_that_follows_the_model_is_refused_before_anything_is_made(tmp_path):
    tuned = lora_fx.apply(decoder(), r=2, target="**.q_proj")
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    arguments = settings(DPOConfig, tmp_path, 2, sync_ref_model=True)
    with pytest.raises(RefusedError, match="sync_ref_model"):
        trainer_of(DPOTrainer, tuned, args=arguments, processing_class=tokenizer(), train_dataset=pairs())
    assert "forward" not in vars(tuned)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


def test_resumed_dpo_goes_on_as_if_uninterrupted(tmp_path):
    def made(folder: str, steps: int) -> Any:
        torch.manual_seed(3)
        tuned = lora_fx.apply(decoder(), r=2, target="**.q_proj", optimise=False)
        arguments = settings(DPOConfig, tmp_path / folder, 2, lr_scheduler_type="constant")
        arguments.max_steps, arguments.save_strategy, arguments.save_steps = steps, "steps", 2
        return trainer_of(DPOTrainer, tuned, args=arguments, processing_class=tokenizer(), train_dataset=pairs())

    whole = made("whole", 4)
    whole.train()
    made("part", 2).train()
    resumed = made("part", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    lines = [[line | {"num_tokens": 0} for line in logged(one)[:4]] for one in (resumed, whole)]  # TRL counts anew
    assert lines[0] == lines[1]
    for one, other in zip(lora_fx.parameters(resumed.model), lora_fx.parameters(whole.model), strict=True):
        assert torch.equal(one, other)
