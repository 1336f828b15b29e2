"""Blocks on the rows of real tokens: what is kept is what it was, and what is left out is there for whoever asks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.liveness.rows import LazyRows
from lora_fx.regions.install import regions
from tests.support.paddedmodels import (
    BATCH,
    ENCODER,
    LENGTH,
    assert_same_step,
    bert,
    gradients,
    in_float32,
    llama,
    padded,
    pair,
)  # fmt: skip


def packed_calls(model: nn.Module) -> list[int]:
    return [region.tally.packed for _, _, region in regions(model) if region.block.programs and region.tally.packed]


def asked(model: nn.Module) -> int:
    return sum(region.tally.asked for _, _, region in regions(model))


def real(outputs: Any) -> Tensor:
    """Return numbers of the first output that belong to real tokens only."""
    mask = padded()["attention_mask"].bool()
    kept: Tensor = outputs[0][mask]
    return (kept * torch.arange(kept.numel(), dtype=kept.dtype).cos().view(kept.shape)).sum()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.sampled(2)
def test_real_rows_and_gradients_are_those_of_the_forward_and_padding_is_not_computed(build, attention) -> None:
    packs, plain = pair(build(attn_implementation=attention), padded())
    assert_same_step(packs, plain, real, **padded())
    assert packed_calls(packs) == [1, 1, 1]
    assert asked(packs) == 0
    assert "liveness" in lora_fx.inspect(packs).regions[0].optimised


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.sampled(2)
def test_losses_with_ignored_labels_do_not_ask_for_padding(weighted: bool, smoothing: float) -> None:
    packs, plain = pair(bert("BertForMaskedLM"), padded())
    labels = padded()["input_ids"].where(padded()["attention_mask"].bool(), -100).flatten()
    words = ENCODER["vocab_size"]
    weight = torch.linspace(1, 2, words, dtype=torch.float64) if weighted else None

    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    assert_same_step(packs, plain, lambda outputs: loss(outputs.logits.view(-1, words), labels), **padded())
    assert packed_calls(packs) == [1, 1, 1]
    assert asked(packs) == 0


def test_left_padding_is_left_out_too() -> None:
    inputs = padded(left=True)
    packs, plain = pair(llama(), inputs)
    assert_same_step(packs, plain, lambda outputs: outputs[0][:, -1].square().sum(), **inputs)
    assert packed_calls(packs) == [1, 1, 1]
    assert asked(packs) == 0


def test_the_gradient_of_the_inputs_is_the_same_and_zero_at_padding() -> None:
    packs, plain = pair(bert(), padded())
    mask, found = padded()["attention_mask"], []
    for model in (packs, plain):
        embedded = torch.randn(BATCH, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        embedded.requires_grad_()
        real(model(inputs_embeds=embedded, attention_mask=mask)).backward()
        found.append(embedded.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert not found[0][mask == 0].any()
    assert packed_calls(packs) == [1, 1, 1]


@pytest.mark.parametrize("build", [bert, llama])
def test_padding_that_is_asked_for_is_what_the_forward_gives_with_its_gradients(build) -> None:
    packs, plain = pair(build(), padded())
    assert_same_step(packs, plain, lambda outputs: outputs[0].square().sum(), **padded())
    ours, theirs = packs(**padded())[0], plain(**padded())[0]
    assert type(ours) is LazyRows
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours + 0, theirs, rtol=1e-6, atol=1e-6)
    assert asked(packs) > 0


def test_a_model_whose_padding_is_always_asked_for_stops_leaving_it_out_and_says_so() -> None:
    packs, plain = pair(bert(), padded())
    for _ in range(4):
        assert_same_step(packs, plain, lambda outputs: outputs[0].square().sum(), **padded())
    assert packed_calls(packs) == [2, 2, 2]
    assert "rows of padding are used outside" in str(lora_fx.inspect(packs))


def test_a_mean_over_real_tokens_by_a_mask_asks_for_nothing() -> None:
    def mean(outputs: Any) -> Tensor:
        mask = padded()["attention_mask"]
        weights = mask.unsqueeze(-1).expand(outputs[0].size()).double()
        pooled = (outputs[0] * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return pooled.square().sum()

    packs, plain = pair(bert(), padded())
    assert_same_step(packs, plain, mean, **padded())
    assert packed_calls(packs) == [1, 1, 1]
    assert asked(packs) == 0


@pytest.mark.parametrize(
    "head",
    ["BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM", "BertForQuestionAnswering"],
)
def test_heads_of_encoders_work_on_what_is_there(head: str) -> None:
    packs, plain = pair(bert(head), padded())
    inputs = padded()
    if head == "BertForSequenceClassification":
        inputs["labels"] = torch.tensor([0, 1, 0, 1])
    elif head == "BertForQuestionAnswering":
        inputs |= {"start_positions": torch.tensor([0, 1, 2, 1]), "end_positions": torch.tensor([3, 3, 3, 3])}
    else:
        inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 2, -100)
    assert_same_step(packs, plain, lambda outputs: outputs.loss, **inputs)
    assert packed_calls(packs) == [1, 1, 1]


@pytest.mark.parametrize("counted", [False, True])
def test_a_decoders_own_loss_is_the_same_whether_its_labels_count_padding_or_not(counted: bool) -> None:
    packs, plain = pair(llama(), padded())
    inputs = padded()
    labels = inputs["input_ids"] if counted else torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    assert_same_step(packs, plain, lambda outputs: outputs.loss, **inputs, labels=labels)
    assert packed_calls(packs) == [1, 1, 1]


def test_a_sequence_classifier_on_a_decoder_takes_the_last_real_token() -> None:
    packs, plain = pair(llama("LlamaForSequenceClassification", num_labels=3), padded())
    inputs = {"input_ids": padded()["input_ids"] * padded()["attention_mask"], **padded()}
    assert_same_step(packs, plain, lambda outputs: outputs.loss, **inputs, labels=torch.tensor([0, 1, 2, 0]))
    assert packed_calls(packs) == [1, 1, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_of_the_model_draws_what_it_drew(attention: str) -> None:
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "attn_implementation": attention}
    packs, plain = pair(bert("BertForTokenClassification", **dropout), padded())
    labels = torch.where(padded()["attention_mask"] == 1, 1, -100)
    for loss_of in (lambda outputs: outputs.loss, lambda outputs: outputs.logits.square().sum()):
        found = []
        for model in (packs, plain):
            torch.manual_seed(5)
            loss = loss_of(model(**padded(), labels=labels))
            found.append((loss, gradients(model, loss), torch.rand(1)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert packed_calls(packs) == [2, 2, 2]


def test_dropout_of_adapters_stays_what_it_was() -> None:
    rules = {"version": 1, "rules": [{"match": {"op": "linear"}, "lora": {"r": 4, "dropout": 0.2}}]}
    packs = lora_fx.apply(bert(), rules, padded(), optimise=["liveness"])
    packs.train()(**padded())
    assert packed_calls(packs) == []
    assert "dropout of adapters" in str(lora_fx.inspect(packs))


def test_without_gradients_without_padding_and_while_checkpointing_all_is_as_before() -> None:
    packs, plain = pair(llama(), padded())
    with torch.no_grad():
        assert type(packs(**padded())[0]) is Tensor
    ids = padded()["input_ids"]
    assert type(packs(input_ids=ids)[0]) is Tensor
    assert type(packs(input_ids=ids, attention_mask=torch.ones_like(ids))[0]) is Tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 has another name for it
        packs.gradient_checkpointing_enable()
    assert_same_step(packs, plain, real, **padded())
    assert packed_calls(packs) == []


def test_a_cache_of_keys_keeps_all_rows() -> None:
    packs, plain = pair(llama(use_cache=True), padded())
    assert_same_step(packs, plain, real, **padded())
    assert packed_calls(packs) == []
    assert "use_cache=False" in str(lora_fx.inspect(packs))


@pytest.mark.slow
def test_hooks_and_hidden_states_see_what_they_saw() -> None:
    packs, plain = pair(bert(), padded())
    assert_same_step(packs, plain, lambda outputs: outputs.hidden_states[2].square().sum(), **padded(), output_hidden_states=True)  # fmt: skip
    seen: list[Tensor] = []
    for model in (packs, plain):
        layer = model.get_submodule("encoder.layer.1")
        layer.register_forward_hook(lambda module, args, output: seen.append(output[0] if type(output) is tuple else output))  # fmt: skip
        real(model(**padded())).backward()
    torch.testing.assert_close(seen[0].detach() + 0, seen[1].detach(), rtol=1e-12, atol=1e-13)
    assert type(seen[0]) is Tensor


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])  # a fused one does not count what it writes
def test_padding_asked_for_after_an_optimisers_step_is_an_error_and_real_rows_are_not(fused: bool) -> None:
    packs, _ = pair(bert(), padded())
    hidden = packs(**padded())[0]
    real((hidden,)).backward()
    torch.optim.SGD(lora_fx.parameters(packs), 0.1, fused=fused).step()
    assert hidden[:, 0].shape == (BATCH, 32)
    with pytest.raises(RefusedError, match="have changed since"):
        print(hidden.sum())


def test_autocast_that_was_on_is_on_when_padding_is_made() -> None:
    packs, plain = pair(in_float32(bert), padded())
    for _ in range(2):  # the first captures, as no sample was under autocast
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = packs(**padded())[0], plain(**padded())[0]
    assert type(ours) is LazyRows
    torch.testing.assert_close(ours.float() + 0, theirs.float(), rtol=0.05, atol=0.05)


def test_a_tensor_that_is_written_to_is_written_to() -> None:
    packs, _ = pair(bert(), padded())
    hidden = packs(**padded())[0]
    hidden[:, 3] = 0
    assert not hidden[:, 3].any()
    assert hidden[:, 4].any()


def test_gradients_of_the_tensor_itself_are_there_for_whoever_asks_first() -> None:
    packs, plain = pair(bert("BertForMaskedLM").bert, padded())  # without a pooler, which uses rows
    found = []
    for model in (packs, plain):
        hidden = model(**padded())[0]
        hidden.retain_grad()
        real((hidden,)).backward()
        found.append(hidden.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


@pytest.mark.slow
def test_a_function_that_torch_does_not_ask_about_meets_the_value_and_gradients_of_real_rows_arrive() -> None:
    packs, plain = pair(bert(), padded())
    assert_same_step(packs, plain, lambda outputs: real((Doubled.apply(outputs[0]),)), **padded())
    packs, _ = pair(bert(), padded())
    with pytest.raises(RefusedError, match="padding"):
        Doubled.apply(packs(**padded())[0]).sum().backward()


class Smoothing(nn.Module):
    """A block whose rows see their neighbours, padding or not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x, mask)


class Attending(nn.Module):
    def __init__(self, neighbours: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.neighbours = neighbours

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)
        if self.neighbours:
            seen = torch.cat([seen[:, 1:], seen[:, :1]], 1)
        return x + self.out(seen)


class Stack(nn.Module):
    def __init__(self, neighbours: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attending(neighbours) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return x


@pytest.mark.parametrize("neighbours", [False, True])
def test_the_proof_finds_that_padding_reaches_real_rows(neighbours: bool) -> None:
    torch.manual_seed(0)
    model, mask = Stack(neighbours).double(), padded()["attention_mask"].bool()
    inputs = {"x": torch.randn(BATCH, LENGTH, 16, dtype=torch.float64), "mask": mask}
    packs, plain = pair(model, inputs)
    assert_same_step(packs, plain, lambda output: output[mask].square().sum(), **inputs)
    assert packed_calls(packs) == ([] if neighbours else [1, 1])
    assert ("not optimised: liveness: on packed rows" in str(lora_fx.inspect(packs))) is neighbours


@pytest.mark.slow
def test_a_copy_of_the_model_packs_by_itself() -> None:
    packs, plain = pair(bert(), padded())
    assert_same_step(copy.deepcopy(packs), plain, real, **padded())


@pytest.mark.slow
def test_padding_asked_for_in_another_mode_or_without_adapters_is_an_error() -> None:
    packs, _ = pair(bert(), padded())
    hidden = packs(**padded())[0]
    packs.eval()
    with pytest.raises(RefusedError, match="have changed since"):
        hidden.sum()
    packs.train()
    with lora_fx.disabled(packs), pytest.raises(RefusedError, match="have changed since"):
        hidden.sum()
    packs.train()
    assert hidden.sum().isfinite()


def test_a_cast_to_the_same_dtype_is_the_tensor_itself_also_when_it_is_written_to() -> None:
    packs, _ = pair(bert(), padded())
    hidden = packs(**padded())[0]
    hidden.to(torch.float64).zero_()
    assert not hidden.any()


@pytest.mark.slow
@pytest.mark.parametrize("low", [-1e4, -1e9])
def test_a_mask_under_which_weights_need_not_be_zero_is_no_padding_and_the_report_says_so(low: float) -> None:
    mask = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.float64).masked_fill(
        padded()["attention_mask"][:, None, None] == 0, low
    )
    inputs = {"input_ids": padded()["input_ids"], "attention_mask": mask.expand(-1, 1, LENGTH, -1)}
    packs, plain = pair(llama(), inputs)
    assert_same_step(packs, plain, real, **inputs)
    assert packed_calls(packs) == []
    assert f"its mask is {low:.3g} at its least" in str(lora_fx.inspect(packs))
