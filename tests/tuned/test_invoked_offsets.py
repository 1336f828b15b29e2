"""aLoRA from embeddings: the caller says where adapters act, by the argument that PEFT has for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from lora_fx.errors import RefusedError
from tests.support.around import OF_OTHERS
from tests.support.invoked import invoked, llama, pair, prompts, rules

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*OF_OTHERS)
OFFSETS = [9, 5, None, 3]
"""Of the rows of `prompts`, counted from their ends."""
OPTIONS = {"max_new_tokens": 6, "do_sample": False}
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def embedded(tuned: nn.Module, ids: Tensor) -> Tensor:
    return tuned.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("inputs", [None, {"input_ids": prompts()}], ids=["modules", "graphs"])
def test_embeddings_with_offsets_give_what_ids_give_and_what_peft_gives(inputs):
    ours, theirs = pair(inputs)
    given = {"inputs_embeds": embedded(ours, prompts()), "alora_offsets": OFFSETS}
    found = ours(**given).logits
    assert_close(found, ours(input_ids=prompts()).logits, **CLOSE)
    assert_close(found, theirs(**given).logits, **CLOSE)
    for more in ({}, {"num_beams": 3}):
        tokens = ours.generate(**given, **OPTIONS, **more)
        assert torch.equal(tokens, ours.generate(prompts(), **OPTIONS, **more)[:, 12:])
    assert torch.equal(ours.generate(**given, **OPTIONS), theirs.generate(**given, **OPTIONS))


def test_offsets_say_it_for_each_adapter_for_rows_and_in_place_of_ids():
    tuned = invoked()
    lora_fx.add(tuned, rules([11]), adapter="other")
    embeddings = embedded(tuned, prompts())
    given = {"default": OFFSETS, "other": [2, None, 4, 0]}
    with lora_fx.rows(tuned, ["default", "other", "other", None]):
        found = tuned(inputs_embeds=embeddings, alora_offsets=given).logits
    for row, (name, offset) in enumerate([("default", 9), ("other", None), ("other", 4), (None, None)]):
        with lora_fx.use(tuned, name):
            alone = tuned(input_ids=prompts()[[row]], alora_offsets=torch.tensor([offset or 0])).logits
        assert_close(found[[row]], alone, **CLOSE)
    tuned(inputs_embeds=embeddings, alora_offsets=OFFSETS).logits.sum().backward()
    assert tuned.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad.abs().sum() > 0


def test_a_cache_of_embeddings_goes_on_with_ids():
    tuned, ids = invoked(), prompts()
    with torch.no_grad():
        whole = tuned(input_ids=ids).logits
        cache = tuned(inputs_embeds=embedded(tuned, ids[:, :10]), alora_offsets=[7, 3, None, 1]).past_key_values
        assert_close(tuned(input_ids=ids[:, 10:], past_key_values=cache).logits, whole[:, 10:], **CLOSE)
        cache = tuned(inputs_embeds=embedded(tuned, ids[[0], :4]), alora_offsets=[None]).past_key_values
        with pytest.raises(RefusedError, match="may have begun in tokens that the model has not seen"):
            tuned(input_ids=ids[[0], 4:], past_key_values=cache)  # the invocation begins with the last of the four
        rest = tuned(input_ids=ids[[0], 4:], past_key_values=cache, alora_offsets=[8]).logits
        base = llama()(input_ids=ids[[0]]).logits[:, 4:]
        assert not torch.allclose(rest, base)


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ([1, 2], "for each of 4 rows"),
        ([1, 2, 3, -1], "from 0 on"),
        ([1, 2, 3, 0.5], "from 0 on"),
        (3, "a list"),
        ({"b": OFFSETS}, "not for 'b'"),
    ],
)
def test_offsets_that_do_not_fit_are_an_error(offsets, says):
    tuned = invoked()
    for ask in (tuned, tuned.generate):
        with pytest.raises(ValueError, match=says):
            ask(inputs_embeds=embedded(tuned, prompts()), alora_offsets=offsets)


def test_generating_with_other_tokens_than_the_prompts_is_refused():
    tuned = invoked()
    for given in ({}, {"negative_prompt_ids": prompts()[[1], 2:9]}):
        with pytest.raises(RefusedError, match="which tokens a call generates from cannot be seen"):
            tuned.generate(prompts()[[0]], **OPTIONS, guidance_scale=1.5, **given)
    for ids in (prompts(), prompts()[[0]]):  # rows of one prompt may be moved by whoever likes to
        called = []

        def other(model: nn.Module, input_ids: Tensor, **more: object) -> Tensor:
            called.append(1)
            return model(input_ids=input_ids).logits.argmax(-1)

        if len(ids) > 1:
            with pytest.raises(RefusedError, match="other code may move rows"):
                tuned.generate(ids, **OPTIONS, custom_generate=other)
            assert not called
        else:
            assert torch.equal(tuned.generate(ids, custom_generate=other), tuned(input_ids=ids).logits.argmax(-1))


# -- states of other classes


class State:
    """What a model carries from call to call."""

    def __init__(self, sums: Tensor) -> None:
        self.parts = {"sums": sums}

    def get_seq_length(self) -> int:
        return 1


class Slots:
    """The same, on which nothing can be noted."""

    __slots__ = ("parts",)
    __init__ = State.__init__
    get_seq_length = State.get_seq_length


class Running(nn.Module):
    """Adds up its tokens; the sum goes on in a state, the same object or another one at each call."""

    def __init__(self, kind: object) -> None:
        super().__init__()
        self.kind, self.words, self.q = kind, nn.Embedding(60, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, state: object = None) -> tuple[Tensor, object]:
        sums = self.q(self.words(ids)).cumsum(1)
        if state is not None:
            sums = sums + (state["sums"] if isinstance(state, dict) else state.parts["sums"])[:, None]
        if self.kind == "in place" and state is not None:
            state.parts["sums"] = sums[:, -1]
            return sums, state
        return sums, {"sums": sums[:, -1]} if self.kind is dict else (Slots if self.kind is Slots else State)(
            sums[:, -1]
        )


@pytest.mark.parametrize("kind", ["in place", "another"])
def test_states_of_any_class_go_on_and_are_refused_once_their_rows_were_moved(kind):
    tuned, ids = lora_fx.apply(Running(kind), rules(name="q"), backend="modules"), prompts()[[0, 2, 3, 0]]
    with torch.no_grad():
        whole, _ = tuned(ids)
        first, state = tuned(ids[:, :3])
        rest, after = tuned(ids[:, 3:], state)
        assert_close(torch.cat((first, rest), 1), whole, **CLOSE)
        if kind == "another":  # the state that was given is as it was
            assert torch.equal(tuned(ids[:, 3:], state)[0], rest)
        for move in (lambda held: held.update(sums=held["sums"][[1, 0, 3, 2]]), lambda held: held["sums"].mul_(2)):
            _, after = tuned(ids)
            move(after.parts)
            with pytest.raises(RefusedError, match="its rows were moved or cut off"):
                tuned(ids[:, :1], after)
    with torch.inference_mode():
        _, after = tuned(ids)
        tuned(ids[:, :1], after)


@pytest.mark.parametrize("kind", [dict, Slots])
def test_states_that_can_carry_nothing_are_refused(kind):
    tuned = lora_fx.apply(Running(kind), rules(name="q"), backend="modules")
    _, state = tuned(prompts())
    with pytest.raises(RefusedError, match="does not say where"):
        tuned(prompts()[:, :1], state)
