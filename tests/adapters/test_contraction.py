"""Factored or merged: both compute the same, and which one is taken follows from sizes, tokens and the machine."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.fused import contraction, machine
from lora_fx.adapters.fused.contraction import DEFAULT, choose, crossover
from lora_fx.adapters.fused.eligible import term_of
from lora_fx.adapters.fused.forward import adapted
from lora_fx.adapters.fused.machine import Machine, Products
from lora_fx.adapters.fused.terms import Facts, Term
from lora_fx.bench import calibration, counters
from lora_fx.bench.analytic import Linear
from lora_fx.cli.bench import _calibrated
from lora_fx.errors import LoraFxWarning
from tests.support import zoo
from tests.support.zoo import rules

N, M, OUT, R = 40, 16, 24, 4
EAGER = Machine(wide=1e-11, knee=0.0, traffic=1e-6, fresh=0.0, call=0.0)
"""Of a machine on which changing a matrix takes forever: merged wins as soon as N (m + n) exceeds 2mn."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def calibrations(tmp_path, monkeypatch):
    """Return the file of calibrations, which is not there yet."""
    file = tmp_path / "deep" / "machine.json"
    monkeypatch.setenv(machine.VARIABLE, str(file))
    contraction.forget()
    yield file
    contraction.forget()


def key(dtype: str = "float32", threads: int = 1) -> machine.Key:
    return machine.device_name("cpu"), dtype, threads


@pytest.fixture
def eager(calibrations):
    """Let layers be merged from few tokens on."""
    machine.write(calibrations, {key(dtype): EAGER for dtype in ("float32", "float64", "bfloat16")})


# -- the model


@pytest.mark.parametrize("found", [DEFAULT, EAGER, Machine(1e-11, 6.0, 1e-10, 1e-10, 0.0)])
@pytest.mark.parametrize("rank", [8, 64, 256])
def test_merged_once_is_merged_for_all_more_tokens(found: Machine, rank: int):
    site = Products(768, 3072, rank)
    least = crossover(found, site)
    gains = [found.seconds(rows, site, "merged") / found.seconds(rows, site, "factored") for rows in range(1, 9999, 7)]
    assert gains == sorted(gains, reverse=True)
    assert [gain <= 1 - contraction.GAIN for gain in gains] == [
        least is not None and rows >= least for rows in range(1, 9999, 7)
    ]


def test_nobody_gains_from_merging_below_the_width_of_the_layer():
    for width in (768, 2048, 4096):
        for rank in (8, 64, 512):
            least = crossover(DEFAULT, Products(width, width, rank))
            assert least is None or least > width


def test_wider_layers_and_smaller_ranks_are_merged_later():
    def least(width: int, rank: int) -> float:
        return crossover(DEFAULT, Products(width, width, rank)) or float("inf")

    assert least(768, 64) < least(768, 16) < least(768, 8)
    assert least(768, 64) < least(2048, 64) < least(4096, 64)


def test_nobody_calibrated_means_factored_at_ranks_that_gain_nothing():
    assert crossover(DEFAULT, Products(768, 768, 8)) is None
    assert crossover(DEFAULT, Products(4096, 4096, 64)) is None


def test_predicted_times_are_the_sums_of_their_products():
    found, site = Machine(wide=1.0, knee=2.0, traffic=10.0, fresh=100.0, call=1000.0), Products(3, 5, 2)
    n, m, out, r = 7, 3, 5, 2
    base = 2 * 2 * n * m * out
    thin = 2 * 2 * n * (m + out) * (r + 2)  # h, z, dB and dA: two of width m, two of width n
    added = 2 * n * (m + out) * r + 2 * 4 * n * (m + out) * 10
    formed = 2 * m * out * r + 2 * 4 * m * out * 10 + 4 * m * out * 100
    assert found.seconds(n, site, "factored") == base + thin + 8000 + added
    assert found.seconds(n, site, "merged") == base + thin + 8000 + 2 * formed


# -- the choice


def tensors(dtype: torch.dtype = torch.float32, rows: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(rows, M, dtype=dtype, requires_grad=True)
    A, B = torch.randn(R, M, dtype=dtype, requires_grad=True), torch.randn(OUT, R, dtype=dtype, requires_grad=True)
    return x, torch.randn(OUT, M, dtype=dtype), A, B


@pytest.mark.usefixtures("eager")
def test_merged_where_it_is_possible_and_pays():
    assert choose(*tensors(), dropout=False, dora=False) == "merged"
    assert choose(*tensors(torch.float64), dropout=False, dora=False) == "merged"
    assert choose(*tensors(rows=M), dropout=False, dora=False) == "factored"


@pytest.mark.usefixtures("eager")
def test_factored_where_merging_would_be_wrong_or_idle():
    x, weight, A, B = tensors()
    assert choose(x, weight, A, B, dropout=True, dora=False) == "factored"
    assert choose(x, weight, A, B, dropout=False, dora=True) == "factored"
    assert choose(x, weight, A.double(), B.double(), dropout=False, dora=False) == "factored"
    assert choose(x, weight, A.detach(), B, dropout=False, dora=False) == "factored"
    assert choose(*tensors(torch.bfloat16), dropout=False, dora=False) == "factored"
    with torch.no_grad():
        assert choose(x, weight, A, B, dropout=False, dora=False) == "factored"


@pytest.mark.usefixtures("eager")
def test_factored_where_the_weight_lies_in_memory_as_no_fresh_tensor_does():
    x, _, A, B = tensors()
    for odd in (torch.randn(M, OUT).t(), torch.randn(OUT * M + 1)[1:].view(OUT, M)):
        assert choose(x, odd, A, B, dropout=False, dora=False) == "factored"


def test_nobody_is_merged_on_a_device_without_a_calibration():
    assert contraction.least_rows("cpu", torch.float32, 1, 768, 768, 64) is not None
    assert contraction.least_rows("mps", torch.float32, 1, 768, 768, 64) is None


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, True), ({"dropout": 0.5}, False), ({"dora": True}, False)],
    ids=["plain", "dropout", "dora"],
)
def test_layers_decide_at_every_call(more: dict[str, object], expected: bool):
    layer = lora_fx.apply(nn.Sequential(nn.Linear(M, OUT)), rules("**", r=R, **more))[0]
    assert term_of(layer, "default", torch.randn(N, M)).facts.merged == expected
    assert not term_of(layer, "default", torch.randn(3, M)).facts.merged
    with torch.no_grad():
        assert not term_of(layer, "default", torch.randn(N, M)).facts.merged


# -- what is computed


def terms(dtype: torch.dtype, merged: tuple[bool, ...], in_out: bool = False) -> list[Term]:
    """Return layers of different sizes on one x, the same each time but for how they are computed."""
    torch.manual_seed(1)
    found = []
    for number, each in enumerate(merged):
        out, r = OUT + 8 * number, R + number
        weight, bias = torch.randn(out, M, dtype=dtype), torch.randn(out, dtype=dtype)
        A, B = torch.randn(r, M, dtype=dtype), torch.randn(out, r, dtype=dtype)
        weight = weight.t().contiguous() if in_out else weight
        facts = Facts(1.5, in_out, merged=each)
        found.append(Term(facts, weight, bias, A.requires_grad_(), B.requires_grad_()))
    return found


def step(given: list[Term], dtype: torch.dtype, create_graph: bool = False) -> list[Tensor]:
    """Return results and gradients, or gradients of the gradients' squares."""
    torch.manual_seed(2)
    x = torch.randn(2, N // 2, M, dtype=dtype, requires_grad=True)
    results = adapted(given, x)
    loss = sum((each**3).mean() for each in results)
    wanted = [x, *(tensor for term in given for tensor in (term.A, term.B))]
    found = torch.autograd.grad(loss, wanted, create_graph=create_graph)
    if create_graph:
        return list(torch.autograd.grad(sum((each**2).sum() for each in found), wanted))
    return [*results, *found]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("in_out", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("merged", [(True,), (True, True, True), (True, False, True), (False, True)], ids=str)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_values_and_gradients_are_those_of_the_factors(dtype, in_out, merged, twice):
    expected = step(terms(dtype, (False,) * len(merged), in_out), dtype, twice)
    found = step(terms(dtype, merged, in_out), dtype, twice)
    for one, other in zip(found, expected, strict=True):
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
    assert term_of(tuned[0], "default", x).facts.merged
    assert torch.equal(tuned(x), base(x))


@pytest.mark.parametrize("backend", ["graph", "modules"])
def test_a_model_of_merged_layers_computes_what_it_computes_without(calibrations, backend):
    ids = zoo.tokens(8, 16)
    tuned = lora_fx.apply(zoo.Gpt(), rules("h.**", bias=True), (ids,), backend=backend)
    zoo.randomise_(tuned)
    trained = list(lora_fx.parameters(tuned))

    def slopes() -> list[Tensor]:
        contraction.forget()
        result = tuned(ids)
        return [result, *torch.autograd.grad((result**2).mean(), trained)]

    expected, apart = slopes(), counters.flops(slopes)
    machine.write(calibrations, {key(): EAGER})
    found, merged = slopes(), counters.flops(slopes)
    assert merged < apart
    for one, other in zip(found, expected, strict=True):
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


# -- the file


def test_calibration_is_written_for_later_processes(calibrations):
    machine.write(calibrations, {key(): EAGER})
    machine.write(calibrations, {key("float64"): DEFAULT})
    assert machine.read(calibrations) == {key(): EAGER, key("float64"): DEFAULT}
    assert [each.name for each in calibrations.parent.iterdir()] == ["machine.json"]
    assert machine.calibrated("cpu", "float32", 1) == EAGER


def test_calibration_for_others_is_not_ours(calibrations):
    machine.write(calibrations, {key(threads=64): EAGER, ("a processor of 1982", "float32", 1): EAGER})
    assert machine.calibrated("cpu", "float32", 1) is None
    assert machine.calibrated("cpu", "float32", 64) == EAGER


def test_file_is_read_once(calibrations):
    assert machine.calibrated("cpu", "float32", 1) is None
    machine.write(calibrations, {key("float64"): EAGER})
    assert machine.calibrated("cpu", "float64", 1) is None
    contraction.forget()
    assert machine.calibrated("cpu", "float64", 1) == EAGER


def row(**changed: object) -> str:
    costs = {"wide": 1e-11, "knee": 8.0, "traffic": 1e-10, "fresh": 1e-10, "call": 1e-6}
    return json.dumps({"version": 1, "machines": [{"device": "d", "dtype": "f", "threads": 1, **costs, **changed}]})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 2}', '{"version": 1, "machines": [1]}', "NaN", row(wide=0), row(call=-1), row(knee="x"),
     row(traffic=float("nan")), row(threads=None)],
)  # fmt: skip
def test_damaged_file_is_told_and_ignored(calibrations, text: str):
    calibrations.parent.mkdir()
    calibrations.write_text(text)
    with pytest.warns(LoraFxWarning, match=r"machine\.json is no calibration of lora_fx and is ignored"):
        assert machine.calibrated("cpu", "float32", 1) is None
    assert machine.calibrated("cpu", "float64", 1) is None, "told once"
    with pytest.warns(LoraFxWarning):
        machine.write(calibrations, {key(): EAGER})
    assert machine.read(calibrations) == {key(): EAGER}


def test_file_that_cannot_be_opened_is_told(calibrations):
    calibrations.mkdir(parents=True)
    with pytest.warns(LoraFxWarning, match="is ignored"):
        assert machine.read(calibrations) == {}


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(machine.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.path() == tmp_path / "lora_fx" / "machine.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert machine.path() == tmp_path / "home" / ".cache" / "lora_fx" / "machine.json"


# -- calibrating


def test_calibrating_measures_writes_and_tells(calibrations, monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    monkeypatch.setattr(calibration, "DTYPES", ("float32",))
    assert machine.calibrated("cpu", "float32", 1) is None
    text = _calibrated()
    found = machine.read(calibrations)
    assert list(found) == [key()]
    assert machine.calibrated("cpu", "float32", 1) == found[key()], "the process that has calibrated uses it too"
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == (machine.device_name("cpu"), f"written to {calibrations}")
    assert [line.split()[:2] for line in lines if line.startswith("  d=")] == [
        [f"d={width}", f"r={rank}"] for width in (768, 2048, 4096) for rank in (8, 16, 64)
    ]


# -- explain


def told(model: nn.Module, **more: object) -> list[str]:
    text = lora_fx.explain(model, "0", rules("**", **more))
    return [line.strip() for line in text.splitlines() if line.strip().startswith("contraction")]


def test_explain_tells_the_contraction_and_where_it_comes_from(calibrations):
    least = crossover(DEFAULT, Products(768, 768, 64))
    wide = nn.Sequential(nn.Linear(768, 768, device="meta"))
    assert told(wide, r=64) == [
        f"contraction: factored below {least:,} tokens, merged from there on (cost model: default)"
    ]
    assert told(wide, r=8) == ["contraction: factored (cost model: default)"]
    machine.write(calibrations, {key(): EAGER})
    contraction.forget()
    assert told(wide, r=8) == ["contraction: factored below 784 tokens, merged from there on (cost model: calibrated)"]


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
