"""Runs that only show what blocks are called with: cheap, and nothing is known afterwards that is not so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lora_fx
from lora_fx.models.torch_internals import function_modes
from lora_fx.regions import learning, survey, thin
from lora_fx.regions.install import regions
from lora_fx.regions.thin import Purpose, ThinLinears
from tests.support.zoo import ZOO, Specimen, rules

pytestmark = pytest.mark.filterwarnings("ignore::lora_fx.LoraFxWarning")


@pytest.fixture
def all_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every linear be thin where any may be, however small."""
    monkeypatch.setattr(thin, "SMALLEST", 0)
    monkeypatch.setattr(thin, "_FEATURES", 2)


def adapted(specimen: Specimen) -> nn.Module:
    return lora_fx.apply(specimen.build(), rules(specimen.rule), specimen.sample())


def graphs_of(tuned: nn.Module) -> list[tuple[object, ...]]:
    """What each region knows: its graphs, the sizes of one and the indices that they have been proven for."""
    return [
        (path, sorted((str(p.graph), sorted(map(sorted, p.ones)), p.guard.proven) for p in region.block.programs))
        for path, _, region in regions(tuned)
    ]


@pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
def test_thin_runs_lead_to_the_same_graphs_and_proofs(specimen: Specimen, request: pytest.FixtureRequest):
    whole = graphs_of(adapted(specimen))
    request.getfixturevalue("all_thin")
    assert graphs_of(adapted(specimen)) == whole


class Numbered(nn.Module):
    """A block that does something else from its fourth on; nothing but its number says so."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.linear = number, nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: dict[int, Tensor]) -> Tensor:
        cache[self.number] = x
        return x - self.linear(x) if self.number > 2 else x + self.linear(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Numbered, range(6)))

    def forward(self, x: Tensor) -> Tensor:
        cache: dict[int, Tensor] = {}
        for block in self.blocks:
            x = block(x, cache)
        return x


def test_blocks_whose_number_matters_are_not_taken_for_those_that_were_compared(all_thin: None):
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 5, 8)
    tuned = lora_fx.apply(model, rules(), (x,))
    assert torch.equal(tuned(x), model(x))


class Whole(nn.Module):
    """Refuses to run on what a thin linear gives; notes how it was run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        here = self.first(x)
        if not torch.allclose(here, x @ self.first.weight.t() + self.first.bias, atol=1e-4):
            raise ValueError("this is not what the weights give")
        for block in self.blocks:
            here = block(here)
        return here


def test_model_that_minds_its_values_is_run_whole(all_thin: None):
    tuned = lora_fx.apply(Whole().eval(), rules("blocks.**"), (torch.randn(2, 5, 8),))
    report = lora_fx.inspect(tuned)
    assert [region.graphs for region in report.regions] == [1, 1, 1]


def test_only_one_run_of_a_sample_computes_everything(monkeypatch: pytest.MonkeyPatch, all_thin: None):
    runs: list[Purpose] = []
    run = survey._run
    monkeypatch.setattr(survey, "_run", lambda *given: (runs.append(given[-1]), run(*given))[1])
    specimen = next(specimen for specimen in ZOO if specimen.name == "gpt")
    plan = lora_fx.plan(specimen.build(), rules(specimen.rule), specimen.sample())
    assert set(runs) == {Purpose.SHOW}, "what is shown by the run that watches weights is not run again"
    lora_fx.apply(specimen.build(), plan)
    assert set(runs) == {Purpose.SHOW, Purpose.PROVE, Purpose.FLOW}


def test_blocks_of_one_kind_are_run_once_where_they_only_show_their_calls(monkeypatch: pytest.MonkeyPatch):
    answered = []
    once = ThinLinears.once
    monkeypatch.setattr(
        ThinLinears, "once", lambda self, key, answer: once(self, key, lambda: (answered.append(key), answer())[1])
    )
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(20)))
    plan = lora_fx.plan(model.eval(), rules(), (torch.randn(2, 5, 8),))
    assert plan.capture is not None
    assert len(answered) < 20, "less than one of twenty blocks for each of the runs"


def test_wrong_graph_is_found_though_other_blocks_are_thin(monkeypatch: pytest.MonkeyPatch, all_thin: None):
    make = learning.program_for

    def broken(*given: object, **named: object) -> object:
        program = make(*given, **named)
        function = program.function
        program.function = lambda module, *inputs: function(module, *inputs) * 1.5
        return program

    monkeypatch.setattr(learning, "program_for", broken)
    specimen = next(specimen for specimen in ZOO if specimen.name == "gpt")
    plan = lora_fx.plan(specimen.build(), rules(specimen.rule), specimen.sample())
    assert all("is not the forward" in region.reason for region in plan.regions if region.reason)
    assert not any(region.backend == "graph" for region in plan.regions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_thin_linear_differs_from_the_real_one_in_nothing_but_values(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, all_thin: None
):
    layer = nn.Linear(6, 5, bias).to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    real = layer(x)
    with ThinLinears(Purpose.SHOW):
        found = layer(x)
    assert (found.shape, found.dtype, found.stride()) == (real.shape, real.dtype, real.stride())
    assert not torch.equal(found, real)
    found.float().sum().backward()
    assert all(tensor.grad is not None for tensor in (x, *layer.parameters()))


def test_thin_linear_follows_autocast_and_refuses_what_the_real_one_refuses(all_thin: None):
    layer = nn.Linear(6, 5)
    with ThinLinears(Purpose.SHOW):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(2, 6)).dtype is torch.bfloat16
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.randn(2, 7))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(2, 6, dtype=torch.float64))
        assert torch.addmm(torch.zeros(5), torch.ones(2, 6), torch.ones(6, 5)).tolist() == [[2.0] * 5] * 2


def test_small_weights_and_other_tensors_are_computed_whole():
    class Odd(Tensor):
        pass

    x, weight = torch.randn(3, 600), torch.randn(500, 600)
    with ThinLinears(Purpose.SHOW):
        assert torch.equal(F.linear(x[:, :6], weight[:, :6]), x[:, :6] @ weight[:, :6].t())
        odd = F.linear(x, weight.as_subclass(Odd))
        assert not torch.equal(F.linear(x, weight), odd)
    assert torch.equal(odd, F.linear(x, weight))


def test_whole_takes_the_mode_off_from_below_others_and_puts_it_back():
    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    mode, other = ThinLinears(Purpose.SHOW), Other()
    with mode, other:
        with mode.whole():
            assert function_modes() == []
        assert function_modes() == [mode, other]
        with pytest.raises(ZeroDivisionError), mode.whole():
            raise ZeroDivisionError
        assert function_modes() == [mode, other]
        assert not mode.paused
