"""Routed experts of transformers as one operation: its values and gradients, where it is used, and where it is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_fx
from lora_fx.adapters.rawweight import experts, known_experts
from lora_fx.adapters.rawweight.experts import Banks, ExpertFacts, Routing, routed_experts
from tests.support.zoo import randomise_

NUMBER, WIDTH, INNER, TOP, TOKENS, R = 6, 16, 8, 2, 11, 3
Run = list[Tensor]


def mixtral(**settings: Any) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_local_experts": NUMBER}
    return MixtralExperts(MixtralConfig(**sizes, **settings))


def qwen(**settings: Any) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_experts": NUMBER}
    return Qwen3MoeExperts(Qwen3MoeConfig(**sizes, **settings))


class Mixture(nn.Module):
    """Experts with a routing that is given."""

    def __init__(self, made: nn.Module, implementation: str = "eager") -> None:
        super().__init__()
        self.experts = made
        self.experts.config._experts_implementation = implementation
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = self.experts(x, index, weights)
        return result


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, two of the first five experts for each, and their weights."""
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(TOKENS, WIDTH, generator=generator), torch.rand(TOKENS, TOP, generator=generator)
    index = torch.stack([torch.randperm(NUMBER - 1, generator=generator)[:TOP] for _ in range(TOKENS)])
    return x.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()


def adapted(
    make: Callable[..., nn.Module] = qwen,
    implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    **lora: Any,
) -> Any:
    torch.manual_seed(0)
    base = Mixture(make(), implementation).to(dtype)
    rules = {"rules": [{"match": {"name": "experts.*_proj"}, "lora": {"r": R, "alpha": 5, **lora}}]}
    tuned = lora_fx.apply(base, rules, given(dtype), backend="modules").train()
    randomise_(tuned)
    return tuned


def is_one_operation(result: Tensor) -> bool:
    return "_Experts" in type(result.grad_fn).__name__


def run(tuned: nn.Module, call: Callable[..., Tensor] | None = None, inputs: Any = None) -> Run:
    """Return the result and the gradients of the inputs and the factors."""
    x, index, weights = given() if inputs is None else inputs
    result = (call or tuned)(x, index, weights)
    tuned.zero_grad()
    result.sin().sum().backward()
    return [result, *(tensor.grad for tensor in (x, weights, *lora_fx.parameters(tuned)))]


def close(one: Run, other: Run, tolerance: float = 1e-4) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def apart(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Run]) -> Run:
    """Return what a call gives when the experts' own forward reads their weights."""
    with monkeypatch.context() as patch:
        patch.setattr("lora_fx.adapters.layers.experts_output", lambda *_: None)
        return call()


implementations = pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])


@implementations
@pytest.mark.parametrize("make", [mixtral, qwen])
def test_values_and_gradients_are_those_of_the_forward_that_reads_the_weights(
    make: Any, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    tuned = adapted(make, implementation)
    result = run(tuned)
    assert is_one_operation(result[0])
    expected = apart(monkeypatch, lambda: run(tuned))
    assert not is_one_operation(expected[0])
    close(result, expected)
    assert not result[3][NUMBER - 1].any(), "no token meets the last expert"


@implementations
def test_parts_of_the_backward_pass_add_up(implementation: str, monkeypatch: pytest.MonkeyPatch):
    tuned = adapted(implementation=implementation)
    expected = run(tuned)
    for entries in (1, 8 * 2 * INNER, 1 << 30):
        monkeypatch.setattr(experts, "_ENTRIES", entries)
        close(run(tuned), expected, 1e-5)


@pytest.mark.slow
def test_gradients_and_gradients_of_gradients_are_right():
    x, index, weights = given(torch.float64)
    generator = torch.Generator().manual_seed(3)
    shapes = ((2 * INNER, WIDTH), (WIDTH, INNER), (R, WIDTH), (2 * INNER, R), (R, INNER), (WIDTH, R))
    banks = [torch.randn(NUMBER, *shape, generator=generator, dtype=torch.float64) / 3 for shape in shapes]
    routing = Routing.of(index, NUMBER, False)
    assert routing is not None

    def call(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        return routed_experts(ExpertFacts(F.silu, (0.5, 2.0), False), routing, x, weights, Banks(*banks[:2], *factors))

    inputs = (x, weights, *(bank.requires_grad_() for bank in banks[2:]))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    slopes = torch.autograd.grad(call(*inputs).sum(), inputs)
    (batched,) = torch.autograd.functional.jacobian(lambda x: call(x, *inputs[1:]).sum(0), (x,), vectorize=True)
    torch.testing.assert_close(batched.sum(0), slopes[0])


@implementations
def test_half_precision_base_with_float32_factors_is_right_within_rounding(implementation: str):
    tuned = adapted(implementation=implementation, dtype=torch.bfloat16)
    result = run(tuned, inputs=given(torch.bfloat16))
    assert is_one_operation(result[0])
    wide = adapted().float()
    with torch.no_grad():
        for one, other in zip(wide.parameters(), tuned.parameters(), strict=True):
            one.copy_(other)
    x, index, weights = given(torch.bfloat16)
    inputs = (x.detach().float().requires_grad_(), index, weights.detach().float().requires_grad_())
    for a, b in zip(result, run(wide, inputs=inputs), strict=True):
        assert (a.float() - b).abs().max() <= 0.03 * b.abs().max()


def test_experts_that_a_token_has_not_are_skipped(monkeypatch: pytest.MonkeyPatch):
    tuned, (x, index, weights) = adapted(), given()
    index[3:7, 1] = NUMBER
    result = run(tuned, inputs=(x, index, weights))
    assert is_one_operation(result[0])
    close(result, apart(monkeypatch, lambda: run(tuned, inputs=(x, index, weights))))
    assert not result[2][3:7, 1].any()


@implementations
def test_checkpoints_and_tensors_that_are_kept_elsewhere(implementation: str):
    tuned = adapted(implementation=implementation)
    expected = run(tuned)

    def offloaded(*inputs: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return tuned(*inputs)

    calls = [lambda *inputs, r=reentrant: checkpoint(tuned, *inputs, use_reentrant=r) for reentrant in (False, True)]
    for call in (*calls, offloaded):
        close(run(tuned, call), expected, 1e-6)


def test_first_call_under_a_checkpoint_keeps_what_the_second_keeps():
    known_experts._proven.clear()
    tuned = adapted()
    close(run(tuned, lambda *inputs: checkpoint(tuned, *inputs, use_reentrant=False)), run(tuned))


def test_some_factors_or_inputs_frozen():
    tuned = adapted()
    expected = run(tuned)
    names = [name for name, _ in tuned.named_parameters() if "lora" in name]
    for frozen in range(2):
        for number, name in enumerate(names):
            tuned.get_parameter(name).requires_grad_(number % 2 == frozen)
        x, index, weights = given()
        result = tuned(x.detach(), index, weights.detach() if frozen else weights)
        assert is_one_operation(result)
        wanted = [number for number, name in enumerate(names) if tuned.get_parameter(name).requires_grad]
        slopes = torch.autograd.grad(result.sin().sum(), [tuned.get_parameter(names[number]) for number in wanted])
        close(list(slopes), [expected[3 + number] for number in wanted], 1e-6)


def test_copies_and_pickles_compute_the_same():
    tuned = adapted()
    expected = run(tuned)
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        result = run(twin)
        assert is_one_operation(result[0])
        close(result, expected, 0.0)


# -- where it is not used


def with_hook(tuned: Any) -> None:
    tuned.experts.act_fn.register_forward_hook(lambda *_: None)


def with_hook_on_a_factor(tuned: Any) -> None:
    tuned.experts.down_proj_lora.lora_A["default"].register_forward_hook(lambda *_: None)


def with_trained_bank(tuned: Any) -> None:
    tuned.experts._parameters["down_proj"].requires_grad_()


def with_adapters_off(tuned: Any) -> None:
    lora_fx.remove(tuned)


def with_other_implementation(tuned: Any) -> None:
    tuned.experts.config._experts_implementation = "batched_mm"


def parallel(tuned: Any) -> None:
    tuned.experts._is_expert_parallel = True


def with_another_activation(tuned: Any) -> None:
    tuned.experts.act_fn = nn.RReLU()


def with_a_gate_of_its_own(tuned: Any) -> None:
    tuned.experts._apply_gate = lambda both: both.chunk(2, dim=-1)[1]


@pytest.mark.parametrize(
    "change",
    [
        with_hook, with_hook_on_a_factor, with_trained_bank, with_other_implementation, with_another_activation,
        with_a_gate_of_its_own,
    ],
)  # fmt: skip
def test_what_is_not_plain_goes_the_way_of_its_own_forward(change: Callable[[Any], None]):
    tuned = adapted()
    assert is_one_operation(tuned(*given()))
    change(tuned)
    assert not is_one_operation(tuned(*given()))


def test_adapters_with_dropout_go_the_way_of_the_forward_while_they_drop():
    tuned = adapted(dropout=0.2)
    assert not is_one_operation(tuned(*given()))
    assert is_one_operation(tuned.eval()(*given()))


def test_calls_that_are_not_plain_go_the_way_of_the_forward():
    tuned, (x, index, weights) = adapted(), given()
    with torch.autocast("cpu"):
        assert not is_one_operation(tuned(x, index, weights))
    assert not is_one_operation(tuned.experts(hidden_states=x, top_k_index=index, top_k_weights=weights))
    with torch.no_grad():
        expected = tuned(x, index, weights)
    torch.testing.assert_close(tuned(x, index, weights), expected)
    slope = torch.func.grad(lambda x: tuned(x, index, weights).sin().sum())(x)
    close([slope], run(tuned)[1:2])


def test_forwards_that_are_not_known_word_by_word_are_not_taken(monkeypatch: pytest.MonkeyPatch):
    assert known_experts.interface_of(Qwen3MoeExperts) is not None
    assert known_experts.interface_of(GptOssExperts) is None
    assert GptOssConfig is not None
    assert known_experts.interface_of(nn.Linear) is None

    class Mine(Qwen3MoeExperts):
        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return super().forward(x, index, weights) * 2

    class Gated(Qwen3MoeExperts):
        def _apply_gate(self, both: Tensor) -> Tensor:
            first, second = both.chunk(2, dim=-1)
            return second * self.act_fn(first)

    assert known_experts.interface_of(Mine) is None
    assert known_experts.interface_of(Gated) is None
    interface = known_experts.interface_of(Qwen3MoeExperts)
    monkeypatch.setitem(interface._local_mapping, "grouped_mm", lambda self, x, index, weights: x)
    tuned = adapted(implementation="grouped_mm")
    assert torch.equal(tuned(*given()), given()[0])


def test_function_that_differs_from_the_forward_is_not_used(monkeypatch: pytest.MonkeyPatch):
    tuned = adapted()
    monkeypatch.setattr(known_experts, "_proven", {})
    monkeypatch.setattr(known_experts, "routed_experts", lambda *args: routed_experts(*args) * 1.01)
    assert not is_one_operation(tuned(*given()))
    assert list(known_experts._proven.values()) == [False]
