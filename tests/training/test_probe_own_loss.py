"""Rates probed with the loss that a model of transformers computes itself: one batch where rows have losses alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from lora_fx.errors import RefusedError
from lora_fx.models.samples import Sample
from lora_fx.rules.reader import read_rules
from lora_fx.training.probing import probe_rates
from tests.support.around import OF_OTHERS, llama
from tests.support.peftkinds import mixtral

pytestmark = pytest.mark.filterwarnings(*OF_OTHERS)

RULES = read_rules({"rules": [{"match": {"name": "**.{q,v}_proj"}, "lora": {"r": 2, "alpha": 8}}]})
RATES = [1e-3, 1e-2]


def batches(**more):
    draw = torch.Generator().manual_seed(0)
    given = []
    for _ in range(4):
        ids = torch.randint(1, 16, (3, 8), generator=draw)
        labels = ids.masked_fill(torch.rand(3, 8, generator=draw) < 0.3, -100)
        given.append(Sample((), {"input_ids": ids, "labels": labels, **more}))
    return given


def own(output, _batch):
    return output.loss.clone()


def test_rows_of_a_causal_model_have_its_loss_each_and_end_as_alone():
    model = llama()
    probe = probe_rates(model, RULES, batches(), None, RATES)
    assert probe.how == "all in one batch"
    alone = probe_rates(model, RULES, batches(), own, RATES)
    assert alone.how.startswith("one after the other")
    assert probe.before == pytest.approx(alone.before, abs=1e-5)
    assert probe.losses == pytest.approx(alone.losses, abs=1e-5)


@pytest.mark.parametrize("kind", ["routers add", "another function", "counted by the caller"])
def test_a_loss_that_is_more_than_that_of_the_logits_runs_apart(kind):
    more = {}
    if kind == "routers add":
        model, more = mixtral(), {"output_router_logits": True}
    else:
        model = llama()
    if kind == "another function":
        model.loss_function = lambda **_: torch.zeros(())
        forward = model.forward
        model.forward = lambda *args, **kwargs: with_loss(forward(*args, **{**kwargs, "labels": None}), kwargs)
    if kind == "counted by the caller":
        more = {"num_items_in_batch": 5}
    probe = probe_rates(model, RULES, batches(**more), None, RATES)
    told = "the loss is the output's own, and not that of its logits alone", "the model may hand num_items_in_batch on"
    assert probe.how.startswith(f"one after the other ({told['num_items_in_batch' in more]}")


def test_what_a_later_batch_alone_has_for_the_loss_counts():
    data = batches()
    data[2].kwargs["num_items_in_batch"] = 50
    probe, alone = (probe_rates(llama(), RULES, data, loss, RATES) for loss in (None, own))
    assert probe.how.startswith("one after the other (the model may hand num_items_in_batch on")
    assert (probe.before, probe.losses) == (alone.before, alone.losses)


def test_a_later_batch_without_labels_is_refused_as_with_jobs_alone():
    data = batches()
    del data[2].kwargs["labels"]
    with pytest.raises(RefusedError, match="needs a loss that is a scalar"):
        probe_rates(llama(), RULES, data, None, RATES)


def with_loss(output: transformers.modeling_outputs.ModelOutput, kwargs):
    output.loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), kwargs["labels"].flatten())
    return output
