"""aLoRA: what cannot act from an invocation on is refused by name, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from lora_fx.errors import RefusedError
from tests.support.around import OF_OTHERS
from tests.support.invoked import INVOCATION, STARTS, invoked, llama, logits, prompts, rules, two

pytestmark = pytest.mark.filterwarnings(*OF_OTHERS)
GIVEN = {"input_ids": prompts()}


def test_embeddings_without_ids_are_refused_by_name():
    tuned = invoked()
    with pytest.raises(RefusedError, match=r"no ids to find it in\n.*'default'.*\[7, 5, 9\]"):
        tuned(inputs_embeds=torch.zeros(1, 3, 32))
    with lora_fx.use(tuned, None):
        tuned(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_part_of_the_model_is_refused_by_name():
    with pytest.raises(RefusedError, match="which tokens this layer sees is not known"):
        invoked().model(prompts())


def test_rows_of_several_sequences_are_refused():
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]).expand(4, -1)
    with pytest.raises(RefusedError, match="a row holds several sequences"):
        invoked()(input_ids=prompts(), position_ids=places)


class Other(nn.Module):
    """Models whose layer does not see the tokens where they stand."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.words, self.q = nn.Embedding(60, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.how == "flat":
            return self.q(x.flatten(0, 1)).view_as(x)
        if self.how == "time first":
            return self.q(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "both ways":
            return self.q(x + x.mean(1, keepdim=True))
        if self.how == "turned":
            return self.q(x.flip(1)).flip(1)
        return self.q(x)


@pytest.mark.parametrize("how", ["flat", "time first", "both ways", "turned"])
def test_layers_that_do_not_see_the_tokens_in_their_order_are_refused_by_name(how):
    tuned = lora_fx.apply(Other(how), rules(name="q"), backend="modules")
    with pytest.raises(RefusedError, match=r"do not see the tokens[\s\S]*  q  its input is"):
        tuned(prompts()[:, :4] if how == "time first" else prompts())


def test_what_calls_have_shown_is_not_believed_of_layers_that_are_added():
    class Two(Other):
        def __init__(self) -> None:
            super().__init__("turned")
            self.p = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.p(self.words(ids))

    tuned = lora_fx.apply(Two().eval(), rules(name="p"), backend="modules")
    tuned(prompts())
    lora_fx.add(tuned, rules(name="q"), adapter="turned")
    lora_fx.use(tuned, "turned")
    with pytest.raises(RefusedError, match="each where it stands"):
        tuned(prompts())


def test_any_model_of_ids_that_looks_back_alone_can_have_an_invocation():
    model = Other("")
    tuned = lora_fx.apply(model, rules(name="q"), backend="modules")
    adapted, base = tuned(prompts()), model(prompts())
    for row, start in enumerate(STARTS):
        assert torch.equal(adapted[row, :start], base[row, :start])
        assert start is None or not torch.allclose(adapted[row, start:], base[row, start:])


def test_embeddings_are_refused_in_the_plan():
    (refused,) = lora_fx.plan(llama(), rules(name="model.embed_tokens"), GIVEN).refused
    assert "not for embedding" in refused.reason


class Reading(Other):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.words(ids), self.q.weight)


def test_weights_that_code_reads_are_refused_in_the_plan_and_at_the_call():
    model = Reading("")
    (refused,) = lora_fx.plan(model, rules(name="q"), (prompts(),)).refused
    assert "code reads this weight" in refused.reason
    tuned = lora_fx.apply(model, rules(name="q"), backend="modules")  # without inputs nobody has seen it
    with pytest.raises(RefusedError, match="code reads an adapted weight itself"):
        tuned(prompts())


def test_a_graph_module_is_refused():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    (refused,) = lora_fx.plan(traced, rules(name="*")).refused
    assert "GraphModule" in refused.reason


def test_an_adapter_with_an_invocation_is_not_put_beside_those_of_a_graph_module():
    traced = lora_fx.apply(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))), rules(None, name="*"))
    with pytest.raises(RefusedError, match="GraphModule"):
        lora_fx.add(traced, rules(name="*"), adapter="b")


def test_replicas_of_data_parallel_are_refused():
    tuned = invoked()
    tuned._is_replica = True
    with pytest.raises(RefusedError, match="DistributedDataParallel"):
        tuned(**GIVEN)


def test_merging_is_refused_by_name_and_removing_gives_the_base():
    tuned = invoked()
    with pytest.raises(lora_fx.errors.MergeError, match="an adapter with an invocation cannot be merged"):
        lora_fx.merge(tuned)
    base = lora_fx.remove(tuned)
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert type(base) is type(llama())
    assert torch.equal(logits(base), logits(llama()))


def test_others_are_merged_while_it_is_not_in_use():
    tuned = two()
    lora_fx.use(tuned, "plain")
    assert_close(logits(lora_fx.merge(tuned)), logits(tuned), atol=1e-5, rtol=1e-5)


def test_it_is_not_combined_with_others():
    with pytest.raises(RefusedError, match="acts from an invocation on"):
        lora_fx.combine(two(), ["default", "plain"], adapter="both")


def test_the_model_says_what_it_has():
    tuned = invoked()
    assert f"invocation={INVOCATION}" in str(tuned.model.layers[0].self_attn.q_proj)
    assert "from 7, 5, 9 on" in str(lora_fx.plan(llama(), rules(), GIVEN))
