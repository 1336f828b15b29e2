"""Late logits in what stands around a training step: the Trainer, accelerate, data parallel, quantised heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_fx
from lora_fx.liveness.heads import late_modules, late_source
from lora_fx.liveness.rows import LazyRows
from tests.liveness.test_heads import adapted, assert_alike, batch, llama, llamas, only_state


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: tensor[number % 2] for name, tensor in batch().items()}


def test_the_trainer_trains_evaluates_and_computes_metrics_as_without(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    results = []
    base = llama()
    for model in (adapted(base), adapted(base, False)):  # accelerate leaves a forward on them
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=True,
        )  # fmt: skip
        seen: list[Any] = []

        def metrics(predictions: Any, seen: list[Any] = seen) -> dict[str, float]:
            seen.append(predictions.predictions.shape)
            return {"mean": float(predictions.predictions.mean())}

        trainer = transformers.Trainer(
            model, arguments, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=metrics
        )
        trained = trainer.train().training_loss
        evaluated = trainer.evaluate()
        assert seen == [(8, 9, 97)]
        results.append([trained, evaluated["eval_loss"], evaluated["eval_mean"]])
    assert results[0] == pytest.approx(results[1], rel=2e-2)


def test_accelerate_converts_outputs_without_computing_them():
    operations = pytest.importorskip("accelerate.utils.operations")
    tuned, _ = llamas()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tuned(**batch())
    assert outputs.logits.dtype is torch.bfloat16
    converted = operations.convert_to_fp32(outputs)
    assert type(converted.logits) is LazyRows
    assert converted.logits.dtype is torch.float32
    assert not converted.logits.lazy_value.is_whole
    assert torch.equal(converted.logits, outputs.logits + 0.0)


def test_under_data_parallel_gradients_are_those_without(tmp_path: Path):
    tuned, eager = llamas()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tuned, find_unused_parameters=True)
        assert_alike(tuned, eager, lambda model: (wrapped if model is tuned else model)(**batch()).loss)
    finally:
        dist.destroy_process_group()


def test_a_quantised_head_is_not_late():
    quantization = pytest.importorskip("torchao.quantization")
    base = llama()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    tuned = adapted(base, target="**.q_proj")
    assert not late_modules(tuned)
    assert "quantised" in lora_fx.inspect(tuned).late[0].refused


def test_a_weight_that_is_no_plain_parameter_is_not_read_later():
    tuned, _ = llamas()
    head = tuned.lm_head
    before = head._parameters["weight"]
    try:
        head._parameters["weight"] = before.detach()  # as FSDP1 does for the time of a forward
        reason = late_source(head, torch.zeros(1, 32, requires_grad=True))
    finally:
        head._parameters["weight"] = before
    assert isinstance(reason, str)
    assert "its weight is a Tensor" in reason


def test_under_fsdp2_which_takes_weights_away_after_a_call_the_logits_are_whole(tmp_path: Path):
    sharding = pytest.importorskip("torch.distributed.fsdp")
    tuned = adapted(llama())
    expected = tuned(**batch()).loss.detach()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharding.fully_shard(tuned, mesh=mesh, reshard_after_forward=True)
        outputs = tuned(**batch())
        outputs.loss.backward()
        torch.testing.assert_close(outputs.loss.detach(), expected, rtol=1e-5, atol=1e-6)
        assert type(outputs.logits) is Tensor
        assert all(p.grad is not None for p in lora_fx.parameters(tuned))
        assert any("sharded" in reason for reason in only_state(tuned).otherwise)
    finally:
        dist.destroy_process_group()
