"""Bases that torchao trains with rounding in mind (QAT, float8), and bare 8-bit weights, which nothing multiplies by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx

quantization = pytest.importorskip("torchao.quantization")
qat = pytest.importorskip("torchao.quantization.qat")

X = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(1))
RULES = {"version": 1, "rules": [{"match": {"name": "*.{up,down}"}, "lora": {"r": 4, "alpha": 8}}]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


INT4 = quantization.IntxWeightOnlyConfig(torch.int4)
INT8_INT4 = quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)


def fake_quantised(config: Any) -> nn.Module:
    quantization.quantize_(model := plain(), qat.QATConfig(config, step="prepare"))
    return model


def in_float8() -> nn.Module:
    return pytest.importorskip("torchao.float8").convert_to_float8_training(plain())


KINDS: dict[str, Callable[[], nn.Module]] = {
    "int4": lambda: fake_quantised(INT4),
    "int4 and int8 inputs": lambda: fake_quantised(INT8_INT4),
    "float8": in_float8,
}


def adapted(model: nn.Module, backend: str) -> nn.Module:
    tuned = lora_fx.apply(model, RULES, (X,), backend=backend)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    return tuned


def changed(tuned: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Return W + ΔW of each site, which gradients reach the adapters through."""
    sums = {}
    for path in ("0.up", "0.down", "1.up", "1.down"):
        layer: Any = tuned.get_submodule(path)
        A, B = (holder["default"].weight for holder in (layer.lora_A, layer.lora_B))
        sums[f"{path}.weight"] = model.get_parameter(f"{path}.weight") + 2 * B @ A
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_round_their_weight_round_it_with_its_change_and_merge_so(kind):
    model = KINDS[kind]()
    assert [site.site.calls for site in lora_fx.plan(model, RULES, (X,)).adapted] == [1, 1, 1, 1]
    grads = {}
    for backend in ("auto", "modules"):
        tuned = adapted(model, backend)
        for run in (lambda: tuned(X), lambda: torch.func.functional_call(model, changed(tuned, model), (X,))):
            tuned.zero_grad()
            output = run()
            (output - 1).square().mean().backward()
            own = [output.detach(), *(parameter.grad.clone() for parameter in lora_fx.parameters(tuned))]
            torch.testing.assert_close(own, grads.setdefault("first", own), rtol=1e-4, atol=1e-6)
        assert all(grad.any() for grad in own[1:])
        with torch.no_grad(), lora_fx.disabled(tuned):
            assert torch.equal(tuned(X), model(X))
        merged = lora_fx.merge(tuned)
        assert type(merged.get_submodule("0.up")) is type(model.get_submodule("0.up"))
        torch.testing.assert_close(merged(X), tuned(X).detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(lora_fx.remove(tuned)(X), model(X))
        torch.testing.assert_close(copy.deepcopy(tuned)(X), tuned(X))


@pytest.mark.parametrize("config", [INT4, INT8_INT4])
def test_a_merged_model_that_is_quantised_at_last_computes_what_was_trained(config):
    tuned = adapted(fake_quantised(config), "auto")
    quantization.quantize_(merged := lora_fx.merge(tuned), qat.QATConfig(config, step="convert"))
    assert type(merged.get_submodule("0.up").weight) is not nn.Parameter
    with torch.no_grad():
        torch.testing.assert_close(merged(X), tuned(X), rtol=1e-4, atol=1e-4)
        assert (lora_fx.remove(tuned)(X) - tuned(X)).abs().max() > 0.01


def test_bare_weights_of_eight_bits_are_refused_by_name():
    model = plain()
    model[0].up.weight = nn.Parameter(model[0].up.weight.to(torch.float8_e4m3fn), requires_grad=False)
    reason = "its weight is bare float8_e4m3fn: torch's layers do not multiply by it"
    with pytest.raises(lora_fx.RefusedError, match=reason):
        lora_fx.apply(model, r=2, target="0.up")
    with pytest.warns(lora_fx.LoraFxWarning, match="0.up"):
        tuned = lora_fx.apply(model, RULES)
    assert lora_fx.list_adapters(tuned)["default"].sites == 3
