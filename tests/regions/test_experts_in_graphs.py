"""Routed experts stay one operation where the block around them runs without a graph, whatever was captured before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import lora_fx
from lora_fx.bench.counters import saved_bytes
from lora_fx.regions import candidates
from lora_fx.regions.known import KNOWN
from tests.support.zoo import randomise_

SITES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RULES = {"rules": [{"match": {"name": SITES}, "lora": {"r": 8}}]}


class MoE(nn.Module):
    def __init__(self, implementation: str) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2)
        config._experts_implementation = implementation
        self.mlp = MixtralSparseMoeBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x)
        return result


def model(implementation: str) -> nn.Module:
    torch.manual_seed(0)
    made = MoE(implementation)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made.bfloat16()


def kept(implementation: str) -> tuple[int, list[str]]:
    """Return the bytes that an adapted model keeps between the passes, and the paths of its regions."""
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    tuned = lora_fx.apply(model(implementation), RULES, (x[:, :16],))
    randomise_(tuned)
    number = saved_bytes(lambda: tuned(x.detach().requires_grad_()), tuple(tuned.parameters()))
    return number, [region.path for region in lora_fx.inspect(tuned).regions]


@pytest.mark.filterwarnings("ignore::lora_fx.errors.LoraFxWarning")
def test_what_grouped_experts_keep_does_not_depend_on_what_was_captured_before():
    KNOWN.clear()
    alone, _ = kept("grouped_mm")
    KNOWN.clear()
    kept("eager")
    after, regions = kept("grouped_mm")
    KNOWN.clear()
    assert after <= alone
    assert not any(path.endswith("experts") for path in regions)


def test_known_experts_are_no_region_and_others_are(monkeypatch: pytest.MonkeyPatch):
    assert candidates.inner_regions(model("grouped_mm"), "mlp", SITES) == []
    monkeypatch.setattr(candidates, "interface_of", lambda kind: None)
    assert candidates.inner_regions(model("grouped_mm"), "mlp", SITES) == ["mlp.experts"]
