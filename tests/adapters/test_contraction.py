"""Factored or merged: both compute the same, and which one is taken follows from sizes and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.fused import contraction
from lora_fx.adapters.fused.contraction import least_rows, merges
from lora_fx.adapters.fused.eligible import term_of
from lora_fx.adapters.fused.forward import adapted
from lora_fx.adapters.fused.terms import Facts, Term
from lora_fx.bench import counters
from lora_fx.bench.analytic import Linear
from tests.support import zoo
from tests.support.zoo import rules

N, M, OUT, R = 40, 16, 24, 4
NEVER = float("inf")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def eager(monkeypatch):
    """Let layers be merged as soon as it saves a FLOP: where N (m + n) exceeds 2mn."""
    monkeypatch.setattr(contraction, "GAIN", 0.0)
    monkeypatch.setattr(contraction, "FEWEST", 0)


# -- by FLOPs


@pytest.mark.parametrize("gain", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("rank", [8, 64, 256])
def test_merged_once_is_merged_for_all_more_tokens(gain: float, rank: int, monkeypatch):
    monkeypatch.setattr(contraction, "GAIN", gain)
    least, counts = least_rows(768, 3072, rank), range(1, 9999, 7)
    layers = [Linear(rows, 768, 3072, rank) for rows in counts]
    ratios = [layer.merged(rebuilt=True).total / layer.factored().total for layer in layers]
    assert ratios == sorted(ratios, reverse=True)
    assert [ratio <= 1 - gain for ratio in ratios] == [least is not None and rows >= least for rows in counts]


def test_nobody_gains_from_merging_below_the_width_of_the_layer():
    for width in (768, 2048, 4096):
        for rank in (8, 64, 512):
            least = least_rows(width, width, rank)
            assert least is None or least > width


def test_wider_layers_and_smaller_ranks_are_merged_later():
    def least(width: int, rank: int) -> float:
        return least_rows(width, width, rank) or NEVER

    assert least(768, 128) < least(768, 64) < least(768, 32) < least(768, 16)
    assert least(768, 64) < least(2048, 64) < least(4096, 64)


def test_ranks_that_gain_nothing_are_factored():
    assert least_rows(768, 768, 8) is None
    assert least_rows(4096, 4096, 64) is None


# -- the choice


def tensors(dtype: torch.dtype = torch.float32, rows: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(rows, M, dtype=dtype, requires_grad=True)
    A, B = torch.randn(R, M, dtype=dtype, requires_grad=True), torch.randn(OUT, R, dtype=dtype, requires_grad=True)
    return x, torch.randn(OUT, M, dtype=dtype), A, B


@pytest.mark.usefixtures("eager")
def test_merged_where_it_is_possible_and_pays():
    assert merges(*tensors(), dropout=False, dora=False)
    assert merges(*tensors(torch.float64), dropout=False, dora=False)
    assert not merges(*tensors(rows=M), dropout=False, dora=False)


@pytest.mark.usefixtures("eager")
def test_factored_where_merging_would_be_wrong_or_idle():
    x, weight, A, B = tensors()
    assert not merges(x, weight, A, B, dropout=True, dora=False)
    assert not merges(x, weight, A, B, dropout=False, dora=True)
    assert not merges(x, weight, A.double(), B.double(), dropout=False, dora=False)
    assert not merges(x, weight, A.detach(), B, dropout=False, dora=False)
    assert not merges(*tensors(torch.bfloat16), dropout=False, dora=False)
    with torch.no_grad():
        assert not merges(x, weight, A, B, dropout=False, dora=False)


@pytest.mark.usefixtures("eager")
def test_factored_where_the_weight_lies_in_memory_as_no_fresh_tensor_does():
    x, _, A, B = tensors()
    for odd in (torch.randn(M, OUT).t(), torch.randn(OUT * M + 1)[1:].view(OUT, M)):
        assert not merges(x, odd, A, B, dropout=False, dora=False)


@pytest.mark.usefixtures("eager")
def test_nobody_is_merged_on_a_device_where_it_was_not_measured():
    x, weight, A, B = tensors()
    assert merges(x, weight, A, B, dropout=False, dora=False)
    x, weight, A, B = (tensor.to("meta") for tensor in (x, weight, A, B))
    assert not merges(x, weight, A, B, dropout=False, dora=False)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, True), ({"dropout": 0.5}, False), ({"dora": True}, False)],
    ids=["plain", "dropout", "dora"],
)
def test_layers_decide_at_every_call(more: dict[str, object], expected: bool):
    layer = lora_fx.apply(nn.Sequential(nn.Linear(M, OUT)), rules("**", r=R, **more))[0]
    assert term_of(layer, (("default", 1.0),), torch.randn(N, M)).facts.merged == expected
    assert not term_of(layer, (("default", 1.0),), torch.randn(3, M)).facts.merged
    with torch.no_grad():
        assert not term_of(layer, (("default", 1.0),), torch.randn(N, M)).facts.merged


# -- what is computed


def terms(dtype: torch.dtype, merged: tuple[bool, ...], in_out: bool = False) -> list[Term]:
    """Return layers of different sizes on one x, the same each time but for how they are computed."""
    torch.manual_seed(1)
    made = []
    for number, is_merged in enumerate(merged):
        out, r = OUT + 8 * number, R + number
        weight, bias = torch.randn(out, M, dtype=dtype), torch.randn(out, dtype=dtype)
        A, B = torch.randn(r, M, dtype=dtype), torch.randn(out, r, dtype=dtype)
        weight = weight.t().contiguous() if in_out else weight
        facts = Facts(1.5, in_out, merged=is_merged)
        made.append(Term(facts, weight, bias, A.requires_grad_(), B.requires_grad_()))
    return made


def step(given: list[Term], dtype: torch.dtype, create_graph: bool = False) -> list[Tensor]:
    """Return results and gradients, or gradients of the gradients' squares."""
    torch.manual_seed(2)
    x = torch.randn(2, N // 2, M, dtype=dtype, requires_grad=True)
    results = adapted(given, x)
    loss = sum((result**3).mean() for result in results)
    wanted = [x, *(tensor for term in given for tensor in (term.A, term.B))]
    gradients = torch.autograd.grad(loss, wanted, create_graph=create_graph)
    if create_graph:
        return list(torch.autograd.grad(sum((gradient**2).sum() for gradient in gradients), wanted))
    return [*results, *gradients]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("in_out", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("merged", [(True,), (True, True, True), (True, False, True), (False, True)], ids=str)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_values_and_gradients_are_those_of_the_factors(dtype, in_out, merged, twice):
    expected = step(terms(dtype, (False,) * len(merged), in_out), dtype, twice)
    gradients = step(terms(dtype, merged, in_out), dtype, twice)
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCES[dtype] * other.abs().max()


def test_gradients_are_right_by_finite_differences():
    (term,) = terms(torch.float64, (True,))
    x = torch.randn(3, M, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted((term._replace(A=A, B=B),), x)[0]

    assert torch.autograd.gradcheck(layer, (x, term.A, term.B))
    assert torch.autograd.gradgradcheck(layer, (x, term.A, term.B))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("in_out", [False, True], ids=["out_in", "in_out"])
def test_adapters_that_are_zero_change_no_bit(dtype: torch.dtype, in_out: bool):
    x = torch.randn(N, M, dtype=dtype)
    for term in terms(dtype, (True, True), in_out):
        nn.init.zeros_(term.B)
        plain = torch.addmm(term.bias, x, term.weight) if in_out else nn.functional.linear(x, term.weight, term.bias)
        assert torch.equal(adapted((term,), x)[0], plain)


@pytest.mark.usefixtures("eager")
def test_a_large_layer_starts_bit_equal_to_its_base():
    base = nn.Linear(192, 320)
    tuned, x = lora_fx.apply(nn.Sequential(base), rules("**", r=64)), torch.randn(512, 192)
    assert term_of(tuned[0], (("default", 1.0),), x).facts.merged
    assert torch.equal(tuned(x), base(x))


@pytest.mark.parametrize("backend", ["graph", "modules"])
def test_a_model_of_merged_layers_computes_what_it_computes_without(monkeypatch, backend):
    ids = zoo.tokens(8, 16)
    tuned = lora_fx.apply(zoo.Gpt(), rules("h.**", bias=True), (ids,), backend=backend)
    zoo.randomise_(tuned)
    trained = list(lora_fx.parameters(tuned))

    def slopes() -> list[Tensor]:
        result = tuned(ids)
        return [result, *torch.autograd.grad((result**2).mean(), trained)]

    expected, apart = slopes(), counters.flops(slopes)
    monkeypatch.setattr(contraction, "GAIN", 0.0)
    monkeypatch.setattr(contraction, "FEWEST", 0)
    gradients, merged = slopes(), counters.flops(slopes)
    assert merged < apart
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCES[torch.float32] * other.abs().max()


# -- what it costs


@pytest.mark.parametrize("input_gradient", [True, False])
def test_flops_of_a_merged_layer_are_those_of_the_formula(input_gradient: bool):
    (term,) = terms(torch.float32, (True,))
    x = torch.randn(N, M, requires_grad=input_gradient)

    def work() -> None:
        adapted((term,), x)[0].sum().backward()

    expected = Linear(N, M, OUT, R).merged(input_gradient, rebuilt=True)
    assert counters.flops(lambda: adapted((term,), x)) == expected.forward
    assert counters.flops(work) == expected.total


@pytest.mark.usefixtures("eager")
def test_flops_of_a_model_that_chooses_merged_are_those_of_the_formula():
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(M, OUT)), rules("**", r=R))
    x = torch.randn(N, M, requires_grad=True)

    def work() -> None:
        tuned(x).sum().backward()

    work()
    assert counters.flops(work) == Linear(N, M, OUT, R).merged(rebuilt=True).total


def test_nothing_is_kept_but_x():
    (term,) = terms(torch.float32, (True,))
    x = torch.randn(N, M, requires_grad=True)
    own = (term.weight, term.bias, term.A, term.B)
    assert counters.saved_bytes(lambda: adapted((term,), x), own) == x.nbytes
    apart = term._replace(facts=term.facts._replace(merged=False))
    assert counters.saved_bytes(lambda: adapted((apart,), x), own) == x.nbytes + 4 * R * N


# -- explain


def told(model: nn.Module, **more: object) -> list[str]:
    text = lora_fx.explain(model, "0", rules("**", **more))
    return [line.strip() for line in text.splitlines() if line.strip().startswith("contraction")]


def test_explain_tells_the_contraction_and_why(monkeypatch):
    least = least_rows(768, 768, 64)
    wide = nn.Sequential(nn.Linear(768, 768, device="meta"))
    assert told(wide, r=64) == [f"contraction: factored below {least:,} tokens, merged from there on"]
    assert told(wide, r=8) == ["contraction: factored (merging saves less than 2% of the FLOPs)"]
    monkeypatch.setattr(contraction, "GAIN", 0.0)
    assert told(wide, r=8) == ["contraction: factored below 768 tokens, merged from there on"]


class Quantised(Tensor):
    """A weight that says itself what numbers it stands for."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Quantised:
        return Tensor._make_subclass(cls, data)

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_explain_tells_what_is_in_the_way_of_merging():
    layer = nn.Sequential(nn.Linear(M, OUT))
    assert told(layer, r=R, dropout=0.1) == ["contraction: factored (dropout)"]
    assert told(layer, r=R, dora=True) == ["contraction: factored (DoRA)"]
    sliced = {
        "version": 1,
        "rules": [{"match": {"name": "0"}, "slices": {"of": ["q", "k"], "adapt": ["k"]}, "lora": {"r": 2}}],
    }
    assert "contraction: factored (slices)" in lora_fx.explain(layer, "0", sliced)
    quantised = nn.Sequential(nn.Linear(M, OUT, bias=False))
    quantised[0].weight = nn.Parameter(Quantised(quantised[0].weight.detach()), requires_grad=False)
    assert told(quantised, r=R) == ["contraction: factored (quantised weight)"]
    assert told(layer.bfloat16(), r=R) == ["contraction: factored (half precision)"]


def test_explain_tells_no_contraction_of_what_is_no_adapted_linear():
    assert told(nn.Sequential(nn.Embedding(M, OUT)), r=R) == []
    assert lora_fx.explain(nn.Sequential(nn.Linear(M, OUT)), "0", rules("other")).count("contraction") == 0
