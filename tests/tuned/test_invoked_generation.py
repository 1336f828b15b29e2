"""generate() and KV caches of a model whose adapter acts from an invocation on: the tokens of PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from lora_fx.errors import RefusedError
from tests.support.around import OF_OTHERS
from tests.support.invoked import invoked, left_padded, llama, pair, prompts, rules

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*OF_OTHERS)
GIVEN = {"input_ids": prompts()}
BACKENDS = pytest.mark.parametrize("inputs", [None, GIVEN], ids=["modules", "graphs"])
CLOSE = {"atol": 1e-6, "rtol": 1e-5}
OPTIONS = {"max_new_tokens": 8, "do_sample": False}


def greedy(tuned: nn.Module, ids: Tensor, number: int, mask: Tensor | None = None) -> Tensor:
    """Return ids with the tokens that follow, each call seeing all of them."""
    for _ in range(number):
        with torch.no_grad():
            scores = tuned(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), 1)
        mask = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return ids


@BACKENDS
@pytest.mark.parametrize("given", [GIVEN, left_padded()], ids=["whole", "padded"])
def test_tokens_are_those_of_peft(inputs, given):
    ours, theirs = pair(inputs)
    found = ours.generate(**given, **OPTIONS)
    assert torch.equal(found, theirs.generate(**given, **OPTIONS))
    assert not torch.equal(found, llama().generate(**given, **OPTIONS))


@BACKENDS
def test_tokens_are_those_of_calls_that_see_the_whole_sequence(inputs):
    tuned = invoked(inputs)
    assert torch.equal(tuned.generate(prompts(), **OPTIONS), greedy(tuned, prompts(), 8))
    assert torch.equal(tuned.generate(prompts(), **OPTIONS, use_cache=False), greedy(tuned, prompts(), 8))


@pytest.mark.parametrize("given", [GIVEN, left_padded()], ids=["whole", "padded"])
def test_beams_of_several_prompts_are_those_of_each_alone(given):
    tuned = invoked()
    together = tuned.generate(**given, **OPTIONS, num_beams=3, num_return_sequences=2)
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        expected = tuned.generate(**alone, **OPTIONS, num_beams=3, num_return_sequences=2)
        assert torch.equal(together[2 * row : 2 * row + 2], expected)


def test_beams_with_a_cache_are_those_without():
    tuned = invoked()
    found = tuned.generate(prompts(), **OPTIONS, num_beams=3)
    assert torch.equal(found, tuned.generate(prompts(), **OPTIONS, num_beams=3, use_cache=False))


@pytest.mark.parametrize(
    "ways",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"num_return_sequences": 2, "num_beams": 2}],
    ids=lambda ways: next(iter(ways)),
)
def test_other_ways_of_generating_give_the_same(ways):
    tuned = invoked()
    same = {name: value for name, value in ways.items() if name.startswith("num")}
    expected = tuned.generate(prompts(), **OPTIONS, **same, use_cache=False)
    assert torch.equal(tuned.generate(prompts(), **OPTIONS, **ways), expected)


def test_rows_of_a_batch_generate_each_with_its_adapter():
    tuned = invoked()
    lora_fx.add(tuned, rules(None), adapter="plain")
    names = ["default", "plain", "default", None]
    with lora_fx.rows(tuned, names):
        together = tuned.generate(prompts(), **OPTIONS)
    for row, name in enumerate(names):
        with lora_fx.use(tuned, name):
            assert torch.equal(tuned.generate(prompts()[row : row + 1], **OPTIONS)[0], together[row])


def test_what_is_generated_does_not_invoke_as_in_peft():
    ours, theirs = pair()
    plain = ours.generate(prompts()[2:3], **OPTIONS)
    token = int(plain[0, 13])  # a token that the base itself generates
    theirs.peft_config["default"].alora_invocation_tokens = [token]
    ours = lora_fx.from_peft(theirs)
    if token not in prompts()[2].tolist():
        assert torch.equal(ours.generate(prompts()[2:3], **OPTIONS), plain)
    assert torch.equal(ours.generate(**GIVEN, **OPTIONS), theirs.generate(**GIVEN, **OPTIONS))


def test_generation_from_embeddings_is_refused_by_name():
    with pytest.raises(RefusedError, match="no ids to find it in"):
        invoked().generate(inputs_embeds=torch.zeros(1, 3, 32), **OPTIONS)


# -- caches


@BACKENDS
def test_a_cache_of_the_base_is_continued_from_the_invocation_on(inputs):
    tuned = invoked(inputs)
    ids = prompts()[[0]]
    with torch.no_grad():
        whole = tuned(input_ids=ids).logits
        for made_by in (llama(), tuned):
            cache = made_by(input_ids=ids[:, :3], use_cache=True).past_key_values
            rest = tuned(input_ids=ids[:, 3:], past_key_values=cache).logits
            assert_close(rest, whole[:, 3:], **CLOSE)


@BACKENDS
def test_calls_one_after_the_other_go_on_where_they_were(inputs):
    tuned = invoked(inputs)
    with torch.no_grad():
        result = tuned(input_ids=prompts(), use_cache=True)
        cache, ids = result.past_key_values, prompts()
        for _ in range(6):
            ids = torch.cat((ids, result.logits[:, -1:].argmax(-1)), 1)
            result = tuned(input_ids=ids[:, -1:], past_key_values=cache)
    assert torch.equal(ids, greedy(tuned, prompts(), 6))


def test_an_invocation_that_began_in_the_cache_counts_once_it_is_whole():
    tuned, ids = invoked(), prompts()[[0]]
    with torch.no_grad():
        cache = tuned(input_ids=ids[:, :5], use_cache=True).past_key_values  # two of its three tokens
        rest = tuned(input_ids=ids[:, 5:], past_key_values=cache).logits
        other = llama()(input_ids=ids[:, :5], use_cache=True).past_key_values
        base = llama()(input_ids=ids[:, 5:], past_key_values=other).logits
    assert not torch.allclose(rest[:, 0], base[:, 0])


def test_an_invocation_that_may_have_begun_in_a_cache_of_unknown_tokens_is_refused():
    tuned, ids = invoked(), prompts()[[0]]
    with torch.no_grad():
        of_base = llama()(input_ids=ids[:, :5], use_cache=True).past_key_values
        repeated = tuned(input_ids=ids[:, :5], use_cache=True).past_key_values
        repeated.batch_repeat_interleave(2)
        for cache, rows in ((of_base, 1), (repeated, 2)):
            with pytest.raises(RefusedError, match="may have begun in tokens that the model has not seen"):
                tuned(input_ids=ids[:, 5:].expand(rows, -1), past_key_values=cache)


def test_a_copied_cache_goes_on_alike():
    tuned = invoked()
    with torch.no_grad():
        cache = tuned(input_ids=prompts(), use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        following = torch.full((4, 2), 11)
        one, two = (tuned(input_ids=following, past_key_values=held).logits for held in (cache, other))
        whole = tuned(input_ids=torch.cat((prompts(), following), 1)).logits[:, -2:]
    assert torch.equal(one, two)
    assert_close(one, whole, **CLOSE)


@pytest.mark.parametrize("change", ["reorder_cache", "crop", "batch_repeat_interleave"])
def test_a_cache_that_was_changed_is_refused_where_adapters_act_in_it(change):
    tuned = invoked()
    how = {"reorder_cache": torch.tensor([1, 0, 3, 2]), "crop": -2, "batch_repeat_interleave": 2}[change]
    with torch.no_grad():
        cache = tuned(input_ids=prompts(), use_cache=True).past_key_values
        getattr(cache, change)(how)
        following = torch.full((8 if change.startswith("batch") else 4, 1), 11)
        with pytest.raises(RefusedError, match="its rows were moved or cut off"):
            tuned(input_ids=following, past_key_values=cache)
        with lora_fx.use(tuned, None):
            tuned(input_ids=following, past_key_values=cache)


def test_a_changed_cache_in_which_no_adapter_acts_is_taken():
    tuned, ids = invoked(), prompts()[[0]]
    with torch.no_grad():
        cache = tuned(input_ids=ids[:, :2], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        rest = tuned(input_ids=ids[:, 2:].expand(2, -1), past_key_values=cache).logits
        assert_close(rest, tuned(input_ids=ids).logits[:, 2:].expand(2, -1, -1), **CLOSE)


def test_a_cache_filled_under_another_choice_knows_its_tokens():
    tuned = invoked()
    with torch.no_grad():
        with lora_fx.use(tuned, None):
            cache = tuned(input_ids=prompts(), use_cache=True).past_key_values
        following = torch.full((4, 1), 11)
        acting = tuned(input_ids=following, past_key_values=copy.deepcopy(cache)).logits
        with lora_fx.use(tuned, None):
            base = tuned(input_ids=following, past_key_values=cache).logits
    assert torch.equal(acting[2], base[2])
    assert not torch.allclose(acting[0], base[0])


def test_chat_goes_on_with_the_cache_of_the_turn_before():
    tuned = invoked()
    first = tuned.generate(prompts()[[0]], **OPTIONS, return_dict_in_generate=True)
    following = torch.cat((first.sequences, torch.tensor([[11, 12]])), 1)
    found = tuned.generate(following, **OPTIONS, past_key_values=first.past_key_values)
    assert torch.equal(found, tuned.generate(following, **OPTIONS))


def test_a_cache_goes_with_the_invocation_whatever_its_adapter_is_called():
    tuned, ids = invoked(), prompts()
    with torch.no_grad():
        cache = tuned(input_ids=ids[:, :8], use_cache=True).past_key_values
        expected = tuned(input_ids=ids[:, 8:], past_key_values=copy.deepcopy(cache)).logits
        lora_fx.rename(tuned, "default", "called")
        lora_fx.add(tuned, rules([5, 9]), adapter="later")
        rest = tuned(input_ids=ids[:, 8:], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(rest, expected)
        lora_fx.use(tuned, "later")
        with pytest.raises(RefusedError, match=r"looked for the invocations .*\n.*'later'"):
            tuned(input_ids=ids[:, 8:], past_key_values=cache)
