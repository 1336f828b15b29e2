"""DeepSpeed's ZeRO-3 leaves each process an empty tensor where a parameter was; stand-ins do so here."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import lora_fx
from tests.support.sharded import PLAIN, adapted, base, files, tokens


def partition(model: nn.Module) -> None:
    """Leave of each parameter what ZeRO-3 leaves (deepspeed/runtime/zero/partition_parameters.py): names and `ds_tensor`."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_numel, parameter.ds_shape = number, parameter.numel(), parameter.shape
        parameter.ds_tensor = parameter.detach().clone()
        parameter.data = torch.empty(0)


@contextlib.contextmanager
def gathered(parameters):
    """As deepspeed.zero.GatheredParameters."""
    for parameter in parameters:
        parameter.data = parameter.ds_tensor
    yield
    for parameter in parameters:
        parameter.data = torch.empty(0)


@pytest.fixture
def partitioned():
    tuned = adapted(PLAIN)
    partition(tuned)
    return tuned


def test_a_partitioned_adapter_is_not_saved(partitioned, tmp_path):
    with pytest.raises(
        lora_fx.AdapterFileError, match="the adapter is partitioned, and this process does not hold it"
    ) as caught:
        lora_fx.save(partitioned, tmp_path / "adapter")
    names = [name for name, _ in caught.value.facts]
    assert names == ["embed", "blocks.0.q", "blocks.0.up", "blocks.0.down", "blocks.1.q", "blocks.1.up", "blocks.1.down",
                     "norm.weight", "norm.bias", "head.weight", "head.bias"]  # fmt: skip
    assert not (tmp_path / "adapter").exists()


def test_a_gathered_adapter_is_saved_with_all_of_its_values(partitioned, tmp_path):
    expected = adapted(PLAIN)
    lora_fx.save(expected, tmp_path / "expected")
    with gathered(list(partitioned.parameters())):
        lora_fx.save(partitioned, tmp_path / "adapter")
    assert files(tmp_path / "adapter") == files(tmp_path / "expected")
    with gathered(list(lora_fx.parameters(partitioned))):
        lora_fx.save(partitioned, tmp_path / "factors")  # the base is not here: its values are not noted
    with torch.no_grad():
        assert torch.equal(lora_fx.load(base(), tmp_path / "factors")(tokens()), expected(tokens()))


def test_partitioned_weights_are_neither_merged_nor_removed(partitioned):
    with pytest.raises(lora_fx.MergeError, match="ZeRO-3 has partitioned its weight") as caught:
        lora_fx.merge(partitioned)
    assert "blocks.0.q" in dict(caught.value.problems)
    with pytest.raises(lora_fx.RefusedError, match="ZeRO-3 holds the parameters") as caught:
        lora_fx.remove(partitioned)
    assert caught.value.refusals[0] == ("embed.weight", "ZeRO-3 has partitioned it, [0]")


def test_gathered_weights_are_neither_merged_nor_removed_as_hooks_of_deepspeed_would_be_in_the_result(partitioned):
    with gathered(list(partitioned.parameters())):
        with pytest.raises(lora_fx.MergeError, match="ZeRO-3 has gathered its weight"):
            lora_fx.merge(partitioned)
        with pytest.raises(lora_fx.RefusedError, match="ZeRO-3 holds the parameters") as caught:
            lora_fx.remove(partitioned)
    assert caught.value.refusals[0] == ("embed.weight", "ZeRO-3 has gathered it for a while")


@pytest.mark.parametrize("what", [lora_fx.deltas, lora_fx.adapter_state, lora_fx.audit])
def test_values_that_are_not_here_are_not_shown(partitioned, what):
    with pytest.raises(lora_fx.RefusedError, match="this process holds no values") as caught:
        what(partitioned)
    assert "deepspeed.zero.GatheredParameters" in str(caught.value)


def test_a_partitioned_model_is_not_adapted():
    model = base()
    partition(model)
    with pytest.raises(lora_fx.RefusedError, match="ZeRO-3 holds the parameters of this model"):
        lora_fx.apply(model, PLAIN)


def test_parameters_are_counted_as_if_they_were_here(partitioned):
    whole = adapted(PLAIN)
    assert str(lora_fx.inspect(partitioned)).splitlines()[-1] == str(lora_fx.inspect(whole)).splitlines()[-1]
    mine, expected = (lora_fx.list_adapters(model)["default"] for model in (partitioned, whole))
    assert (mine.parameters, mine.norm) == (expected.parameters, None)
