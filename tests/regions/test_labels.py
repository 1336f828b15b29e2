"""Last blocks whose rows are computed where a loss asks for them: what comes of it is what it was."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.bench.counters import flops
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
)
from tests.support.paddedmodels import pair as pair_of

transformers = pytest.importorskip("transformers")
LEFT_OUT = ["stack", "recompute", "liveness", "loss"]
pair = functools.partial(pair_of, optimise=LEFT_OUT)


def labelled(some: float = 0.3, **more: Any) -> dict[str, Tensor]:
    """Return sentences without padding, of which each has another number of labels, the second one none."""
    ids = padded()["input_ids"]
    numbers = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    chosen = (numbers * 7 % 10 < some * 10) & (numbers // LENGTH != 1)
    return {"input_ids": ids, "labels": torch.where(chosen, ids, -100), **more}


def calls(model: nn.Module) -> tuple[int, int]:
    """Return how many calls of blocks were left for later, and how often all their rows were asked for after all."""
    tallies = [region.deferring.tally for _, _, region in regions(model)]
    return sum(tally.packed for tally in tallies), sum(tally.asked for tally in tallies)


def its_loss(outputs: Any) -> Tensor:
    loss: Tensor = outputs.loss
    return loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM", "BertForTokenClassification"])
@pytest.mark.sampled(2)
def test_loss_and_gradients_are_those_of_the_forward_and_one_block_is_left_for_later(head: str, attention: str) -> None:
    build = llama if "Llama" in head else bert
    inputs = labelled()
    if "Token" in head:
        inputs["labels"] = torch.where(inputs["labels"] >= 0, inputs["labels"] % 2, -100)
    late, plain = pair(build(head, attn_implementation=attention), inputs)
    assert_same_step(late, plain, its_loss, **inputs)
    assert calls(late) == (1, 0)
    assert "labels" in lora_fx.inspect(late).regions[2].optimised
    assert "labels" not in lora_fx.inspect(late).regions[0].optimised


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_padding_and_tokens_without_a_label_are_left_out_together(head: str) -> None:
    inputs = labelled(attention_mask=padded()["attention_mask"])
    inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["labels"], -100)
    late, plain = pair((llama if "Llama" in head else bert)(head), inputs)
    for _ in range(2):
        assert_same_step(late, plain, its_loss, **inputs)
    assert calls(late) == (2, 0)
    assert [region.tally.packed for _, _, region in regions(late)][:2] == [2, 2]
    assert sum(region.tally.asked for _, _, region in regions(late)) == 0


def test_a_label_on_padding_is_computed_as_well() -> None:
    inputs = labelled(attention_mask=padded()["attention_mask"])
    late, plain = pair(llama(), inputs)
    assert_same_step(late, plain, its_loss, **inputs)


def test_a_step_costs_what_its_labels_cost() -> None:
    inputs = labelled(0.2)
    model = llama(num_hidden_layers=1, vocab_size=500)
    late, plain = pair(model, inputs)
    for tuned in (late, plain):
        tuned(**inputs).loss.backward()
    spent = [flops(lambda tuned=tuned: tuned(**inputs).loss.backward()) for tuned in (late, plain)]
    assert spent[0] < 0.35 * spent[1]


@pytest.mark.parametrize("chosen", ["none", "one", "all"])
def test_any_number_of_labels_is_right(chosen: str) -> None:
    inputs = labelled()
    ids = inputs["input_ids"]
    late, plain = pair(llama(), inputs)
    labels = {"none": torch.full_like(ids, -100), "all": ids}.get(chosen)
    if labels is None:
        labels = torch.full_like(ids, -100)
        labels[2, 5] = 3

    def summed(outputs: Any) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")

    for _ in range(3):
        assert_same_step(late, plain, summed, input_ids=ids)
    assert calls(late) == ((2, 2) if chosen == "all" else (3, 0))
    assert ("all rows are asked for" in str(lora_fx.inspect(late))) is (chosen == "all")


def test_logits_and_hidden_states_that_somebody_reads_are_those_of_the_forward() -> None:
    inputs = labelled()
    late, plain = pair(llama(), inputs)
    ours, theirs = late(**inputs), plain(**inputs)
    assert type(ours.logits) is LazyRows
    torch.testing.assert_close(ours.logits + 0, theirs.logits, rtol=1e-6, atol=1e-6)
    assert calls(late) == (1, 1)

    def both(outputs: Any) -> Tensor:
        return outputs.loss + outputs.logits.square().mean()  # type: ignore[no-any-return]

    assert_same_step(late, plain, both, **inputs)


def test_two_losses_on_other_rows_share_what_they_can() -> None:
    inputs = labelled()
    late, plain = pair(llama(), inputs)

    def both(outputs: Any) -> Tensor:
        words = outputs.logits[:, 3:5].flatten(0, 1)
        return outputs.loss + F.cross_entropy(words, inputs["input_ids"][:, 3:5].flatten())  # type: ignore[no-any-return]

    assert_same_step(late, plain, both, **inputs)
    assert calls(late) == (1, 1)


def test_a_classifier_of_first_tokens_computes_one_row_of_each_sequence() -> None:
    inputs = {"input_ids": padded()["input_ids"], "labels": torch.tensor([0, 1, 0, 1])}
    late, plain = pair(bert("BertForSequenceClassification"), inputs)
    assert_same_step(late, plain, its_loss, **inputs)
    assert calls(late) == (1, 0)


def test_a_classifier_of_last_tokens_does_too() -> None:
    inputs = {"input_ids": padded()["input_ids"], "labels": torch.tensor([0, 1, 2, 1])}
    late, plain = pair(llama("LlamaForSequenceClassification", num_labels=3), inputs)
    assert_same_step(late, plain, its_loss, **inputs)
    assert calls(late) == (1, 0)


def test_the_gradient_of_the_inputs_is_the_same() -> None:
    late, plain = pair(llama(), labelled())
    found = []
    for model in (late, plain):
        generator = torch.Generator().manual_seed(3)
        embedded = torch.randn(BATCH, LENGTH, 32, dtype=torch.float64, generator=generator).requires_grad_()
        model(inputs_embeds=embedded, labels=labelled()["labels"]).loss.backward()
        found.append(embedded.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert calls(late) == (1, 0)


def test_an_encoder_decoder_leaves_out_rows_of_its_decoder_only() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = transformers.T5ForConditionalGeneration(config).double()
    inputs = {**labelled(), "use_cache": False}
    late, plain = pair(model, inputs)
    for _ in range(3):
        assert_same_step(late, plain, its_loss, **inputs)
    tallies = {path: region.deferring.tally for path, _, region in regions(late)}
    assert (tallies["decoder.block.1"].packed, tallies["decoder.block.1"].asked) == (3, 0)
    assert tallies["encoder.block.1"].packed <= 2  # cross-attention asks for all of them


@pytest.mark.parametrize("only", ["liveness", "loss"])
def test_it_is_done_where_both_names_are_given(only: str) -> None:
    late = lora_fx.apply(llama(), r=4, target="all-linear", example_inputs=labelled(), optimise=["stack", only])
    late.train()(**labelled()).loss.backward()
    assert calls(late) == (0, 0)


def test_dropout_of_the_model_and_of_adapters_is_a_reason_not_to() -> None:
    model = bert("BertForMaskedLM", hidden_dropout_prob=0.2)
    late, plain = pair(model, labelled())
    found = []
    for each in (late, plain):
        torch.manual_seed(5)
        loss = each(**labelled()).loss
        found.append((loss, gradients(each, loss), torch.rand(1)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert calls(late) == (0, 0)
    assert "labels: its dropout draws" in str(lora_fx.inspect(late))
    rules = {"rules": [{"match": {"op": "linear"}, "lora": {"r": 4, "dropout": 0.2}}]}
    dropping = lora_fx.apply(bert("BertForMaskedLM"), rules, labelled(), optimise=LEFT_OUT).train()
    dropping(**labelled()).loss.backward()
    assert calls(dropping) == (0, 0)
    assert "labels: the dropout of adapters" in str(lora_fx.inspect(dropping))


def test_without_gradients_with_hooks_with_a_cache_and_while_checkpointing_all_is_as_before() -> None:
    late, plain = pair(llama(), labelled())
    with torch.no_grad():
        assert type(late(**labelled()).logits) is Tensor
    assert_same_step(
        late, plain, lambda out: out.hidden_states[-1].square().sum(), **labelled(), output_hidden_states=True
    )
    late, plain = pair(llama(), labelled())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 has another name for it
        late.gradient_checkpointing_enable()
    assert_same_step(late, plain, its_loss, **labelled())
    assert calls(late) == (0, 0)
    cached, plain = pair(llama(use_cache=True), labelled())
    assert_same_step(cached, plain, its_loss, **labelled())
    assert calls(cached) == (0, 0)
    assert "labels: it writes in place, or to a cache" in str(lora_fx.inspect(cached))
    hooked, plain = pair(llama(), labelled())
    seen: list[Tensor] = []
    hooked.get_submodule("model.layers.2").register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same_step(hooked, plain, its_loss, **labelled())
    assert calls(hooked) == (0, 0)
    assert type(seen[0]) is Tensor
    assert "labels: it has hooks" in str(lora_fx.inspect(hooked))


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, lambda p, lr: torch.optim.AdamW(p, lr, fused=True)])
def test_rows_asked_for_after_an_optimisers_step_are_an_error(optimiser: Any) -> None:
    late, _ = pair(llama(), labelled())
    outputs = late(**labelled())
    outputs.loss.backward()
    optimiser(list(lora_fx.parameters(late)), lr=0.1).step()
    with pytest.raises(RefusedError, match=r"since|written to"):
        print(outputs.logits.sum())


@pytest.mark.parametrize("shown", [lambda hidden: hidden, Tensor.detach], ids=["itself", "detached"])
def test_what_was_made_of_rows_that_are_written_to_since_is_refused(shown: Any) -> None:
    inputs = labelled()
    late, plain = pair(llama(), inputs)

    def loss(model: nn.Module, before: bool) -> Tensor:
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        made = None if before else hidden + 1
        shown(hidden).mul_(2)
        logits = model.lm_head(hidden + 1 if made is None else made)
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    torch.testing.assert_close(loss(late, before=True), loss(plain, before=True), rtol=1e-6, atol=1e-6)
    with pytest.raises(RefusedError, match="has been written to since"):
        loss(late, before=False)


def test_a_block_that_is_run_again_and_again_leaves_out_padding_and_the_last_time_rows_without_a_label() -> None:
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.AlbertConfig(**ENCODER, embedding_size=16, **off)
    inputs = {**padded(), "labels": torch.where(padded()["attention_mask"] > 0, labelled()["labels"], -100)}
    late, plain = pair(transformers.AlbertForMaskedLM(config).double(), inputs)
    for _ in range(4):
        assert_same_step(late, plain, its_loss, **inputs)
    region = next(region for path, _, region in regions(late) if path.endswith("groups.0"))
    assert not region.tally.stopped
    assert not region.deferring.tally.stopped
    assert (region.tally.packed, region.deferring.tally.packed) > (6, 3)
    assert not any(why for told in lora_fx.inspect(late).regions for why in told.given_up)


def test_autocast_that_was_on_is_on_when_rows_are_made() -> None:
    late, plain = pair(in_float32(llama), labelled())
    found = []
    for model in (late, plain):
        for _ in range(2):  # the first captures, as no sample was under autocast
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=labelled()["input_ids"]).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), labelled()["labels"].flatten())
        found.append((loss.detach(), gradients(model, loss)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.02)
    assert calls(late)[0] >= 1


def test_copies_and_pickles_leave_out_what_the_model_does() -> None:
    late, plain = pair(llama(), labelled())
    for other in (copy.deepcopy(late), pickle.loads(pickle.dumps(late))):
        for _ in range(3):
            assert_same_step(other, plain, its_loss, **labelled())
        assert calls(other)[0] >= 1


class Blurring(nn.Module):
    """Attention after which every row takes in the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out, self.up = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        seen = seen + torch.roll(seen, 1, 1)
        return x + self.up(torch.tanh(self.out(seen)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(Blurring() for _ in range(2))
        self.head = nn.Linear(16, 60)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_what_mixes_rows_otherwise_is_computed_for_all_of_them() -> None:
    torch.manual_seed(0)
    late, plain = pair(Tagger().double(), labelled())
    assert_same_step(late, plain, lambda loss: loss, **labelled())
    assert calls(late) == (1, 0)


def test_code_that_is_not_the_forward_is_found_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_fx.passes.labels as labels

    monkeypatch.setattr(labels, "at_tokens", wrong_tokens)
    late, plain = pair(copy.deepcopy(llama()), labelled())  # of which nothing has been proven
    assert_same_step(late, plain, its_loss, **labelled())
    assert calls(late) == (0, 0)
    assert "labels: on the rows that are asked for" in str(lora_fx.inspect(late))


def wrong_tokens(x: Tensor, asked: Any, dims: int, axis: int) -> Tensor:
    """Give every query the entry of the first token."""
    x = x[(None,) * (dims - x.dim())]
    return x.narrow(axis, 0, 1).expand(*x.shape[:axis], asked.tokens.shape[1], *x.shape[axis + 1 :])


def test_a_loss_after_the_choice_of_an_adapter_has_ended_is_of_the_chosen_one() -> None:
    late, plain = pair(llama(), labelled())
    found = []
    for model in (late, plain):
        lora_fx.add(model, {"rules": [{"match": {"op": "linear"}, "lora": {"r": 2}}]}, adapter="b")
        with lora_fx.use(model, {"default": 0.5}):
            logits = model(input_ids=labelled()["input_ids"]).logits
        model.eval()
        loss = F.cross_entropy(logits.flatten(0, 1), labelled()["labels"].flatten())
        found.append((loss.detach(), gradients(model, loss)[0]))
        assert not any(module.training for module in model.modules())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert calls(late) == (1, 0)


def test_the_base_alone_leaves_nothing_for_later() -> None:
    late, plain = pair(llama(), labelled())
    with lora_fx.disabled(late), lora_fx.disabled(plain):
        ours, theirs = late(**labelled()), plain(**labelled())
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=1e-12)
    assert calls(late) == (0, 0)
