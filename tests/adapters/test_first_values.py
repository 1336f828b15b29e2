"""A model that had no values when it was adapted: `reset_parameters` of its factors gives those that `apply` would."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.factors.lora import LoRAFactor
from tests.support.sharded import rule

KINDS = {
    "linear": lambda: nn.Linear(6, 12),
    "embedding": lambda: nn.Embedding(9, 12),
    "convolution": lambda: nn.Conv1d(4, 12, 3, groups=2),
}
SLICES = {"of": ["a", "b", "c"], "adapt": ["a", "c"]}


def adapted(kind: str, **lora: object) -> nn.Module:
    options = lora.pop("options", {})
    return lora_fx.apply(nn.Sequential(KINDS[kind]()), {"version": 1, "rules": [{**rule("0", **lora), **options}]})


def started_empty(kind: str, **lora: object) -> nn.Module:
    with torch.device("meta"):
        tuned = adapted(kind, **lora)
    return tuned.to_empty(device="cpu")


def reset(tuned: nn.Module) -> None:
    for module in tuned.modules():
        if isinstance(module, LoRAFactor):
            module.reset_parameters()


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_rule(kind, init):
    torch.manual_seed(2)
    fresh = adapted(kind, init=init)
    tuned = started_empty(kind, init=init)
    for _ in range(2):
        torch.manual_seed(2)
        KINDS[kind]()  # in the order in which the base and its factors are drawn
        reset(tuned)
    names = [name for name, _ in tuned.named_parameters() if "lora_" in name]
    assert len(names) == 2
    assert any(fresh.get_parameter(name).any() for name in names)
    for name in names:
        assert torch.equal(tuned.get_parameter(name), fresh.get_parameter(name))


def test_kaiming_values_are_those_of_torch():
    torch.manual_seed(2)
    layer = nn.Linear(7, 5)
    nn.init.kaiming_uniform_(expected := torch.empty(3, 7), a=5**0.5)
    torch.manual_seed(2)
    nn.Linear(7, 5)
    tuned = lora_fx.apply(nn.Sequential(layer), {"version": 1, "rules": [rule("0", r=3)]}, backend="modules")
    assert torch.equal(tuned[0].lora_A["default"].weight, expected)


def test_both_factors_are_drawn_where_the_rule_says_so():
    tuned = started_empty("linear", init="random")
    reset(tuned)
    assert all(bool(parameter.any()) and bool(parameter.isfinite().all()) for parameter in lora_fx.parameters(tuned))


def test_rows_of_slices_are_there_again():
    tuned, expected = (make("linear", options={"slices": SLICES}) for make in (started_empty, adapted))
    reset(tuned)
    assert torch.equal(tuned[0].lora_B["default"].rows, expected[0].lora_B["default"].rows)
    assert torch.equal(tuned[0].lora_B["default"].columns, expected[0].lora_B["default"].columns)


def test_without_memory_nothing_happens():
    with torch.device("meta"):
        tuned = adapted("linear")
    reset(tuned)
    assert all(parameter.is_meta for parameter in lora_fx.parameters(tuned))


def test_what_needs_the_weight_is_refused():
    tuned = started_empty("linear", init="pissa")
    with pytest.raises(lora_fx.RefusedError, match="the first values of this adapter are not random") as caught:
        reset(tuned)
    assert caught.value.refusals == (("0", "init pissa"),)
    magnitude = started_empty("linear", dora=True)[0].lora_magnitude_vector["default"]
    with pytest.raises(lora_fx.RefusedError, match="no first values without its weight"):
        magnitude.reset_parameters()
