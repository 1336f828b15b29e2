"""What holds an adapted model beside other modules keeps those as they are: trained, merged, removed, disabled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.placed import Placed, placed_in
from tests.support.around import assert_close, filled

RULES = {"version": 1, "rules": [{"match": {"name": "first"}, "lora": {"r": 2, "bias": True}}], "train": ["last"]}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


class Holder(nn.Module):
    """Its own `last` bears the name of one that the adapted model trains, its `norm` that of one with a base value."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.last, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for model in self.models:
            x = model(x)
        return self.norm(self.last(x))


def bases(number: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Base().eval() for _ in range(number)]


def held(number: int) -> tuple[nn.Module, nn.Module]:
    """Return the bases in a holder, and twins of them in a copy of it."""
    plain = Holder(*bases(number)).eval()
    adapted = copy.deepcopy(plain)
    for index, base in enumerate(plain.models):
        adapted.models[index] = filled(lora_fx.apply(base, RULES, (X,)))
    with torch.no_grad():
        adapted.models[0].last.weight.add_(1)
        adapted.norm.running_mean.add_(1)
        plain.norm.running_mean.add_(1)
    return plain, adapted


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


both = pytest.mark.parametrize("number", [1, 2])


@both
def test_all_that_is_trained_in_a_held_twin_is_trained(number):
    _, holder = held(number)
    alone = [parameter for twin in holder.models for parameter in lora_fx.parameters(twin)]
    assert {id(p) for p in lora_fx.parameters(holder)} == {id(p) for p in alone}
    report = lora_fx.inspect(holder)
    assert report.trained == tuple(f"models.{index}.last" for index in range(number))
    assert report.trainable == sum(p.numel() for p in alone)


@both
def test_held_twin_is_merged_and_what_holds_it_keeps_flags_and_trains_apart(number):
    plain, holder = held(number)
    before = holder(X)
    merged = lora_fx.merge(holder)
    assert_close(merged(X), before)
    assert flags(merged) == flags(plain)
    with torch.no_grad():
        for parameter in (*lora_fx.parameters(holder), *holder.last.parameters()):
            parameter.add_(1)
    assert_close(merged(X), before)


@both
def test_held_twin_is_removed_and_switched_off(number):
    plain, holder = held(number)
    with lora_fx.disabled(holder):
        assert torch.equal(holder(X), plain(X))
    assert not torch.equal(holder(X), plain(X))
    removed = lora_fx.remove(holder)
    assert torch.equal(removed(X), plain(X))
    assert flags(removed) == flags(plain)
    assert list(removed.state_dict()) == list(plain.state_dict())


def test_file_of_a_held_twin_would_not_fit_and_is_refused(tmp_path):
    _, holder = held(1)
    with pytest.raises(lora_fx.RefusedError, match=r"more than that: it holds one at models\.0"):
        lora_fx.save(holder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_part_of_a_twin_is_merged_removed_and_switched_off():
    (base,) = bases(1)
    twin = nn.Sequential(base, nn.Linear(6, 2))
    rules = {"version": 1, "rules": [{"match": {"name": "0.first"}, "lora": {"r": 2}}], "train": ["0.last", "1"]}
    part = filled(lora_fx.apply(twin.eval(), rules, (X,)))[0]
    with torch.no_grad():
        part.last.weight.add_(1)
    assert_close(lora_fx.merge(part)(X), part(X))
    assert flags(lora_fx.merge(part)) == flags(lora_fx.remove(part)) == flags(base)
    assert torch.equal(lora_fx.remove(part)(X), base(X))
    with lora_fx.disabled(part):
        assert torch.equal(part(X), base(X))
    assert lora_fx.inspect(part).trained == ("last",)


def test_model_that_lacks_what_it_was_adapted_with_is_refused():
    _, holder = held(1)
    del holder.models[0].last
    with pytest.raises(lora_fx.RefusedError, match=r"not the whole adapted model"):
        lora_fx.remove(holder)


def test_names_at_hand_are_those_of_the_adapted_model():
    _, holder = held(2)
    assert [place.here for place in placed_in(holder)] == ["models.0.", "models.1."]
    (whole,) = placed_in(holder.models[0])
    assert (whole.here, whole.there) == ("", "")
    (part,) = placed_in(nn.ModuleDict({"x": holder.models[0].first}))
    assert part == Placed(whole.record, "x.", "first.")
    assert part.recorded("x.weight") == "first.weight"
    assert part.recorded("y.weight") is None
    assert placed_in(nn.Linear(2, 2)) == []
