"""Experts and T5 with padding, checkpoints and several adapters: a step on graphs is one on modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers import T5Config, T5ForConditionalGeneration

import lora_fx
from tests.support import moe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ALL = ["stack", "recompute", "liveness", "loss"]
LOOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.02}
"""Of a gradient's largest entry."""


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_same_step(one: nn.Module, other: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    (loss, mine), (expected, theirs) = step(one, inputs), step(other, inputs)
    torch.testing.assert_close(loss, expected, rtol=LOOSE[dtype], atol=0)
    assert mine.keys() == theirs.keys() != set()
    worst = {name: float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in mine}
    assert max(worst.values()) <= LOOSE[dtype], worst


def randomise_all_(tuned: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(tuned.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return tuned.train()


def padded(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :3], mask[2, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("optimise", [True, ALL], ids=["usual", "all"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
@pytest.mark.sampled(4)
def test_experts_with_padding_and_two_adapters(kind, implementation, optimise, checkpointed, dtype):
    inputs = padded(moe.IDS, moe.IDS)
    inputs["labels"] = moe.IDS.masked_fill(inputs["attention_mask"] == 0, -100)

    def made(**options: Any) -> nn.Module:
        base: Any = moe.model(implementation, kind).to(dtype)
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.config.use_cache = False
        first = moe.rules("**.{q,v}_proj", "**.experts.{gate_up,down}_proj", "lm_head")
        tuned = lora_fx.apply(base, first, inputs, **options)
        lora_fx.add(tuned, moe.rules("**.{k,o}_proj", "**.experts.down_proj", r=3), adapter="b")
        return randomise_all_(tuned)

    graphs, modules = made(optimise=optimise), made(backend="modules")
    for choice in ("default", ["default", "b"], "b"):
        lora_fx.use(graphs, choice)
        lora_fx.use(modules, choice)
        assert_same_step(graphs, modules, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("optimise", [True, ALL], ids=["usual", "all"])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
@pytest.mark.sampled(2)
def test_decoder_of_t5_that_is_deeper_than_its_encoder(feed_forward, optimise, dtype):
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(1, 50, (3, length), generator=generator) for length in (7, 5))
    labels[0, 3:] = -100
    inputs = padded(ids, labels)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
    config = T5Config(
        **sizes, num_decoder_layers=4, feed_forward_proj=feed_forward, dropout_rate=0.0, decoder_start_token_id=0
    )

    def made(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        base = T5ForConditionalGeneration(config).to(dtype)
        return randomise_all_(lora_fx.apply(base, moe.rules("**.{q,k,v,o,wi,wo,wi_0,wi_1}"), inputs, **options))

    graphs, modules = made(optimise=optimise), made(backend="modules")
    assert_same_step(graphs, modules, inputs, dtype)
    with torch.no_grad():
        assert torch.equal(graphs.eval()(**inputs).logits, modules.eval()(**inputs).logits)


def test_a_step_of_another_adapter_is_seen():
    inputs = padded(moe.IDS, moe.IDS)
    one, other = (moe.adapted("eager", moe.rules("**.q_proj"), "mixtral") for _ in range(2))
    for tuned in (one, other):
        randomise_all_(tuned)
    with torch.no_grad():
        next(iter(lora_fx.parameters(other))).mul_(1.5)
    with pytest.raises(AssertionError):
        assert_same_step(one, other, inputs, torch.float32)
