"""What rules say of banks of experts alone: which factor they share, and how r is divided among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.planning.plan import Plan
from lora_fx.tuned.build import record_in
from tests.support.compoundkinds import EXPERTS
from tests.support.sitekinds import ALPHA, Kind, factors, same_values


def loop() -> Kind:
    return EXPERTS[0]


def rules(kind: Kind, share: str = "outer", **lora: Any) -> dict[str, Any]:
    written = kind.rules()
    written["rules"][0]["lora"] |= {"share": share, **lora}
    return written


def decided(kind: Kind, **lora: Any) -> Plan:
    return lora_fx.plan(kind.build(), rules(kind, **lora), kind.sample())


def test_what_cannot_be_decided_is_refused_by_name():
    kind = Kind("odd", Odd, lambda: (torch.randn(2, 6),), {"odd": "bank out_in"})
    (site,) = decided(kind).refused
    assert site.reason == (
        "whether odd is the first matrix of the experts or the last is not known; write share: A or share: B"
    )
    assert decided(kind, share="B").adapted
    sliced = rules(loop(), "A")
    sliced["rules"][0]["slices"] = {"of": ["x", "y"], "adapt": ["y"]}
    plan = lora_fx.plan(loop().build(), sliced, loop().sample())
    assert {site.reason for site in plan.refused} == {
        "share is for whole matrices of a bank, not for slices; leave out one"
    }
    assert {site.reason for site in decided(loop(), r=4, divide_r="experts").refused} == {
        "r = 4 cannot be divided among 3 experts: take a multiple of 3"
    }
    with pytest.raises(lora_fx.RefusedError, match="cannot be divided among 5 parts"):
        lora_fx.apply(loop().build(), rules(loop(), divide_r=5), loop().sample())


class Odd(nn.Module):
    """A bank of which the name tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.odd[1])


@pytest.mark.parametrize(("divide_r", "r"), [("experts", 2), (2, 3), (3, 2)])
def test_r_is_divided_among_the_experts_of_a_bank_and_of_nothing_else(divide_r: object, r: int, tmp_path: Any):
    kind = loop()

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), kind.make()).eval()

    lora = {"r": 6, "alpha": ALPHA, "divide_r": divide_r, "init": "random"}
    given_rules = {"rules": [{"match": {"name": "**"}, "lora": lora}]}
    x = torch.randn(7, 6)
    tuned = lora_fx.apply(build(), given_rules, (x,))
    ranks = {one.spec.path: (one.spec.lora.r, one.spec.scaling) for _, one in all_attached(tuned)}
    banks = ("1.experts.gate_up_proj", "1.experts.down_proj")
    assert ranks == {"0": (6, ALPHA / 6), **dict.fromkeys(banks, (r, ALPHA / r))}
    plan = record_in(tuned).plan
    assert plan.trainable == sum(factor.numel() for factor in factors(tuned).values())
    if divide_r == "experts":
        assert sum(site.trainable for site in plan.adapted[1:]) == 6 * (6 + 8 + 4 + 6), "as of one dense pair"
    assert Plan.from_json(plan.to_json()) == plan
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(build(), tmp_path, (x,))
    assert same_values(tuned, loaded)
    assert torch.equal(loaded(x), tuned(x))
