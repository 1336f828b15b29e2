"""aLoRA: an adapter acts from the last occurrence of its invocation on, and the base alone before it; PEFT agrees."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import lora_fx
from lora_fx.adapters.tokens import NEVER, last_occurrences
from lora_fx.errors import RefusedError
from tests.support.around import OF_OTHERS
from tests.support.invoked import (
    INVOCATION,
    STARTS,
    gradients,
    in_peft,
    invoked,
    left_padded,
    llama,
    logits,
    pair,
    prompts,
    rules,
    two,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*OF_OTHERS)
GIVEN = {"input_ids": prompts()}
BACKENDS = pytest.mark.parametrize("inputs", [None, GIVEN], ids=["modules", "graphs"])
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.mark.parametrize(
    ("ids", "last"),
    [([1, 2, 1, 2], 2), ([1, 2, 3, 4], 0), ([2, 1, 1, 1], NEVER), ([3, 3, 3, 1], NEVER), ([1, 1, 1, 2], 2)],
)
def test_the_last_occurrence_counts_and_only_a_whole_one(ids, last):
    assert last_occurrences(torch.tensor([ids]), (1, 2)).item() == last


def test_padding_has_no_invocation_in_it_though_its_ids_be_the_same():
    tuned, ids, mask = invoked(), prompts()[[0, 2]], torch.ones(2, 12, dtype=torch.long)
    ids[0, 7:10] = ids[1, :3] = torch.tensor(INVOCATION)
    mask[0, 7:] = mask[1, :2] = 0  # on the right all of one, on the left a part of one
    with torch.no_grad():
        found = tuned(input_ids=ids, attention_mask=mask).logits
        assert_close(found[:1, :7], tuned(input_ids=ids[:1, :7]).logits, **CLOSE)
        assert torch.equal(found[1, 2:], llama()(input_ids=ids, attention_mask=mask).logits[1, 2:])
    options = {"attention_mask": mask[1:], "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(tuned.generate(ids[1:], **options), llama().generate(ids[1:], **options))


def test_rows_shorter_than_the_invocation_have_none():
    assert last_occurrences(torch.tensor([[1], [1]]), (1, 2)).tolist() == [NEVER, NEVER]


@BACKENDS
@pytest.mark.parametrize("given", [GIVEN, left_padded()], ids=["whole", "padded"])
def test_logits_are_those_of_peft(inputs, given):
    ours, theirs = pair(inputs)
    assert_close(logits(ours, **given), logits(theirs, **given), **CLOSE)


@BACKENDS
def test_before_the_invocation_and_without_it_the_base_alone_acts_bit_by_bit(inputs):
    tuned = invoked(inputs)
    adapted, base = logits(tuned), logits(llama())
    for row, start in enumerate(STARTS):
        assert torch.equal(adapted[row, :start], base[row, :start])
        assert start is None or not torch.allclose(adapted[row, start:], base[row, start:])


@BACKENDS
def test_gradients_are_those_of_peft(inputs):
    ours, theirs = pair(inputs)
    for model in (ours.train(), theirs.train()):
        model(**GIVEN, labels=prompts()).loss.backward()
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_a_batch_without_the_invocation_trains_nothing_and_does_not_fail():
    tuned = invoked().train()
    ids = prompts()[2:3]
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert all(not gradient.any() for gradient in gradients(tuned).values())


@pytest.mark.parametrize(
    "optimise", [True, ("stack", "recompute", "halve", "compile", "liveness", "loss")], ids=["usual", "all"]
)
def test_graphs_made_for_training_act_where_the_modules_do(optimise):
    given = {
        **left_padded(),
        "labels": left_padded()["input_ids"].masked_fill(left_padded()["attention_mask"] == 0, -100),
    }
    tuned, modules = invoked(given, optimise=optimise).train(), invoked().train()
    for number in range(3):
        moved = {name: value.roll(number, 0) for name, value in given.items()}
        for model in (tuned, modules):
            model.zero_grad()
            model(**moved).loss.backward()
        for name, gradient in gradients(modules).items():
            assert_close(gradients(tuned)[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_graphs_hold_no_places_of_invocations():
    tuned, modules = invoked(GIVEN), invoked()
    logits(tuned)
    misses = [sum(region.misses.values()) for region in lora_fx.inspect(tuned).regions]
    for number in range(1, 4):
        moved = prompts().roll(number, 1)
        assert_close(logits(tuned, input_ids=moved), logits(modules, input_ids=moved), **CLOSE)
    assert [sum(region.misses.values()) for region in lora_fx.inspect(tuned).regions] == misses


# -- among several


@BACKENDS
def test_a_plain_adapter_beside_acts_on_every_token_as_in_peft(inputs):
    theirs = in_peft(llama())
    theirs.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    theirs.base_model.set_adapter(["default", "plain"])
    with theirs._enable_peft_forward_hooks(alora_offsets=[None if s is None else 12 - s for s in STARTS]):
        expected = theirs.base_model(**GIVEN).logits
    ours = lora_fx.from_peft(theirs, inputs)
    assert_close(logits(ours), expected.detach(), **CLOSE)


@BACKENDS
def test_what_is_used_decides(inputs):
    tuned, base = two(inputs), logits(llama())
    before = logits(tuned)
    with lora_fx.use(tuned, None):
        assert torch.equal(logits(tuned), base)
    with lora_fx.disabled(tuned):
        assert torch.equal(logits(tuned), base)
    with lora_fx.use(tuned, "plain"):
        assert not torch.allclose(logits(tuned)[2], base[2])
    with lora_fx.use(tuned, "other"):
        other = logits(tuned)
        assert torch.equal(other[[0, 1, 3]], base[[0, 1, 3]])
        assert not torch.allclose(other[2, 4:], base[2, 4:])
        assert torch.equal(other[2, :4], base[2, :4])
    with lora_fx.use(tuned, {"default": 0.0, "other": 1.0}):
        assert torch.equal(logits(tuned), other)
    assert torch.equal(logits(tuned), before)


@BACKENDS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_row_has_its_adapter_and_each_adapter_its_tokens(inputs, training):
    tuned = two(inputs).train(training)
    names = ["default", "plain", "other", None]
    with lora_fx.rows(tuned, names):
        together = tuned(**GIVEN).logits
    for row, name in enumerate(names):
        with lora_fx.use(tuned, name):
            assert_close(logits(tuned, input_ids=prompts()[row : row + 1])[0], together[row].detach(), **CLOSE)


def test_rows_that_are_not_those_of_the_ids_are_refused():
    tuned = two()
    with lora_fx.rows(tuned, ["default", "plain"]), pytest.raises(RefusedError, match="2 rows"):
        tuned(**GIVEN)


def test_adapters_are_renamed_and_dropped_with_their_invocation():
    tuned = two()
    before = logits(tuned)
    lora_fx.rename(tuned, "default", "first")
    assert torch.equal(logits(tuned), before)
    lora_fx.drop(tuned, "other")
    lora_fx.use(tuned, "plain")
    lora_fx.drop(tuned, "first")
    assert torch.equal(logits(tuned), logits(tuned))
    with torch.no_grad():
        tuned(inputs_embeds=torch.zeros(1, 3, 32))


# -- what stands around


@BACKENDS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_blocks_act_on_the_same_tokens_when_they_are_made_again(inputs, reentrant):
    tuned = invoked(inputs).train()
    tuned(**GIVEN, labels=prompts()).loss.backward()
    expected = gradients(tuned)
    tuned.zero_grad()
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tuned.enable_input_require_grads()
    losses = [tuned(input_ids=ids, labels=ids).loss for ids in (prompts(), prompts().flip(0))]
    losses[0].backward()
    for name, gradient in gradients(tuned).items():
        assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@BACKENDS
def test_threads_do_not_see_each_others_tokens(inputs):
    tuned = invoked(inputs)
    given = [prompts().roll(number, 1) for number in range(4)]
    expected = [logits(tuned, input_ids=ids) for ids in given]
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        found[number] = [logits(tuned, input_ids=given[number]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected[number]) for number in range(4) for result in found[number])


@BACKENDS
def test_copies_and_pickles_act_alike(inputs):
    tuned = invoked(inputs)
    expected = logits(tuned)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert_close(logits(other), expected, **CLOSE)


def test_a_compiled_model_acts_from_the_invocation_on():
    tuned = invoked()
    compiled = torch.compile(tuned, backend="eager")
    for number in range(4):
        moved = prompts().roll(number, 1)
        assert_close(logits(compiled, input_ids=moved), logits(tuned, input_ids=moved), **CLOSE)


def test_a_frozen_prefix_is_kept_as_ever():
    rule = rules(name="model.layers.1.**.{q,v}_proj")
    tuned = lora_fx.apply(llama(), rule, GIVEN).train()
    plain = [tuned(input_ids=prompts().roll(n, 1)).logits for n in range(3)]
    with lora_fx.cached_prefix(tuned):
        for _ in range(2):
            for number in range(3):
                assert torch.equal(tuned(input_ids=prompts().roll(number, 1)).logits, plain[number])


def test_a_half_precision_base_and_autocast():
    base = llama().to(torch.bfloat16)
    theirs = in_peft(base)
    ours = lora_fx.from_peft(theirs)
    assert_close(logits(ours).float(), logits(theirs).float(), atol=0.02, rtol=0.02)
    whole, peers = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(logits(whole).float(), logits(peers).float(), atol=0.05, rtol=0.05)


def test_dropout_drops_and_leaves_the_tokens_before_alone():
    torch.manual_seed(1)
    tuned = lora_fx.apply(llama(), rules(dropout=0.5), backend="modules").train()
    base, adapted = logits(llama()), logits(tuned)
    assert torch.equal(adapted[0, :3], base[0, :3])
    assert not torch.equal(adapted, logits(tuned))


@BACKENDS
def test_errors_in_a_call_leave_nothing_behind(inputs):
    tuned = invoked(inputs)
    before = logits(tuned)
    with pytest.raises(IndexError, match="out of range"):
        tuned(input_ids=torch.full((1, 4), 1000))
    assert torch.equal(logits(tuned), before)
    assert not lora_fx.adapters.selection.is_apart()
