"""Programs whose code torch.compile makes: once for each kind of call, equal to the module backend but for rounding.

Most tests stop before machine code is made (torch's own `aot_eager`), which is all that differs: it is quick.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.bench.counters import saved_bytes
from lora_fx.errors import LoraFxWarning
from lora_fx.regions import compiling
from lora_fx.regions.install import regions
from tests.regions.test_optimised import BLOCKS, Tower, X, assert_equal_but_for_rounding, block, ordinary, trained
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the compiler make no machine code."""
    monkeypatch.setattr(compiling, "inductor", torch._dynamo.lookup_backend("aot_eager_decomp_partition"))
    yield
    compiling._SHARED.clear()


def towers(
    forward: Callable[..., Any] = ordinary, optimise: Any = ("compile",), **lora: Any
) -> tuple[nn.Module, nn.Module]:
    """Return a tower adapted to be compiled, and by modules, in training with equal values."""
    torch.manual_seed(0)
    base, rules = Tower(block(forward)), zoo.rules(r=4, **lora)
    pair = lora_fx.apply(base, rules, (X,), optimise=list(optimise)), lora_fx.apply(base, rules, backend="modules")
    for model in pair:
        zoo.randomise_(model)
    return pair[0].train(), pair[1].train()


def compilations(*models: nn.Module) -> int:
    """Return how often torch has compiled something for the models."""
    programs = {id(p): p for model in models for _, _, region in regions(model) for p in region.block.programs}
    codes = {id(code): code for p in programs.values() if p.compiling for code in p.compiling.codes.values() if code}
    return sum(code.compilations for code in codes.values())


def report(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return what was done to the programs of a model, and why something was not."""
    told = lora_fx.inspect(model).regions
    return {name for region in told for name in region.optimised}, {why for region in told for why in region.given_up}


def assert_agree(pair: tuple[nn.Module, nn.Module], *shapes: tuple[int, int]) -> None:
    for shape in shapes or ((2, 6),):
        x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(shape[0]))
        assert_equal_but_for_rounding(*(trained(model, lambda model, x=x: model(x)) for model in pair))


UNFIT = {
    "sibling_changed_in_place": "writes in place",
    "input_of_the_norm_changed_before": "writes in place",
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("lora", [{}, {"dropout": 0.1}, {"dora": True}, {"lora_fa": True}], ids=str)
@pytest.mark.parametrize("forward", BLOCKS, ids=lambda function: function.__name__)
@pytest.mark.sampled(2)
def test_block_computes_what_it_computes_by_modules_compiled_or_with_a_reason(forward: Any, lora: dict[str, Any]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        pair = towers(forward, **lora)
        # code for sizes of one is made apart: by all forwards of plain factors, and all kinds of factors in one forward
        ones = [(1, 3)] if forward is ordinary or not lora else []
        assert_agree(pair, (2, 6), (3, 5), *ones, (2, 6))
    done, reasons = report(pair[0])
    assert ("compile" in done) != bool(reasons)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_compiled_block_keeps_less_where_a_is_frozen_and_compiles_no_more(dropout: float):
    kept, compiled = [], []
    x = torch.randn(2, 32, 16)
    for frozen in (False, True):
        pair = towers(lora_fa=frozen, dropout=dropout)
        assert_agree(pair, (2, 32))
        assert report(pair[0]) == ({"compile"}, set())
        own = (*pair[0].parameters(), *pair[0].buffers())
        kept.append(saved_bytes(lambda model=pair[0]: model(x), own))
        compiled.append(compilations(pair[0]))
    assert kept[1] < kept[0]
    assert compiled[0] == compiled[1]


@pytest.mark.usefixtures("quick")
def test_sizes_that_vary_compile_nothing_after_the_first_step_of_their_kind():
    pair = towers()
    assert_agree(pair, (2, 6))
    first = compilations(pair[0])
    assert first == 2, "the first block's input wants no gradient, the second's does"
    assert_agree(pair, (3, 5), (2, 7), (4, 9), (7, 2), (5, 64))
    assert compilations(pair[0]) == first
    assert_agree(pair, (1, 6))
    assert compilations(pair[0]) == 2 * first, "a size of one is a kind of its own"
    assert_agree(pair, (1, 5), (1, 9))
    assert_agree((pair[0].eval(), pair[1].eval()), (1, 5), (3, 4))
    assert compilations(pair[0]) == 2 * first
    assert_agree(pair, (6, 6), (8, 8))
    assert compilations(pair[0]) == 3 * first, "as are equal ones"
    assert report(pair[0])[1] == set()


@pytest.mark.usefixtures("quick")
def test_beside_liveness_batches_without_padding_are_compiled_and_others_are_right() -> None:
    from tests.support.paddedmodels import assert_same_step, llama, padded, pair

    short = {**padded(), "labels": torch.where(padded()["attention_mask"] > 0, padded()["input_ids"], -100)}
    full = {**short, "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    named = ("stack", "recompute", "liveness", "loss", "compile")
    both = pair(llama(num_hidden_layers=2), short, optimise=named)
    counts = []
    for inputs in (short, full, short, full):
        assert_same_step(*both, lambda out: out.loss, **inputs)
        counts.append(compilations(both[0]))
    assert counts[0] < counts[1] == counts[3]
    assert set(lora_fx.inspect(both[0]).regions[0].optimised) == {"stack", "recompute", "liveness", "compile"}


@pytest.mark.usefixtures("quick")
def test_patterns_of_gradients_and_autocast_are_kinds_of_calls():
    pair = towers()
    for model in pair:
        model.blocks[1].q.lora_A.requires_grad_(False)
    assert_agree(pair, (2, 6), (3, 5))
    assert compilations(pair[0]) == 2
    for model in pair:
        model.blocks[1].q.lora_A.requires_grad_(True)
    x = X.clone().requires_grad_()
    assert_equal_but_for_rounding(*(trained(model, lambda model: model(x)) for model in pair))
    assert compilations(pair[0]) == 3, "both blocks are called alike now"
    with torch.autocast("cpu", torch.bfloat16):
        for length in (6, 5, 4):
            runs = [trained(model, lambda model, n=length: model(X[:, :n])) for model in pair]
            assert_equal_but_for_rounding(*runs, values=0.1, slopes=0.1)
    assert report(pair[0]) == ({"compile"}, set())
    count = compilations(pair[0])
    assert_agree(pair, (2, 6))
    assert compilations(pair[0]) == count


@pytest.mark.usefixtures("quick")
def test_calls_without_gradients_and_under_a_checkpoint_are_not_compiled():
    pair = towers()
    with torch.no_grad():
        torch.testing.assert_close(*(model(X) for model in pair), rtol=1e-6, atol=1e-6)
    x = X.clone().requires_grad_()
    runs = [trained(model, lambda model: checkpoint(model, x, use_reentrant=False)) for model in pair]
    assert_equal_but_for_rounding(*runs)
    assert compilations(pair[0]) == 0


@pytest.mark.usefixtures("quick")
def test_twins_of_one_model_share_what_was_compiled():
    torch.manual_seed(0)
    base = Tower(block(ordinary))
    first, second = (lora_fx.apply(base, zoo.rules(r=4), (X,), optimise=["compile"]).train() for _ in range(2))
    other = lora_fx.apply(base, zoo.rules(r=4, alpha=3), (X,), optimise=["compile"]).train()
    for model in (first, second):
        model(X).sum().backward()
    assert compilations(first, second) == 2
    other(X).sum().backward()
    assert compilations(first, second, other) == 4, "its scaling is another constant"


@pytest.mark.usefixtures("quick")
def test_copies_and_pickles_are_compiled_anew_or_share():
    pair = towers()
    assert_agree(pair)
    twin = copy.deepcopy(pair[0])
    assert_agree((twin, pair[1]))
    assert compilations(pair[0], twin) == 2
    again = pickle.loads(
        pickle.dumps(lora_fx.apply(zoo.Mlp(), zoo.rules(), (torch.randn(3, 16),), optimise=["compile"]))
    )
    assert all(region.block.passes == ("compile",) for _, _, region in regions(again))


@pytest.mark.usefixtures("quick")
def test_what_changes_the_twin_afterwards_is_right():
    pair = towers(dropout=0.1)
    assert_agree(pair)
    count = compilations(pair[0])
    for model in pair:
        state = {name: value + 0.01 for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        model.blocks[0].q.lora_B["default"].weight = nn.Parameter(torch.ones(16, 4) * 0.01)
    assert_agree(pair)
    assert compilations(pair[0]) == count
    with lora_fx.disabled(pair[0]), lora_fx.disabled(pair[1]):
        torch.testing.assert_close(*(model(X) for model in pair), rtol=1e-6, atol=1e-6)
    merged = [lora_fx.merge(model).eval()(X) for model in pair]
    torch.testing.assert_close(*merged, rtol=1e-6, atol=1e-6)
    for model in pair:
        model.double()
    runs = [trained(model, lambda model: model(X.double())) for model in pair]
    assert_equal_but_for_rounding(*runs)
    runs = [trained(model, lambda model: model(X.double())) for model in pair]
    assert compilations(pair[0]) == 2 * count
    assert report(pair[0])[1] == set()


class Dropping(block(ordinary)):  # type: ignore[misc]
    """A block with a dropout that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x, self.drop(self.q(x)), self.norm(x))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_dropouts_that_are_modules_are_compiled_where_they_are_off_and_never_beside_those_of_adapters(p: float):
    torch.manual_seed(0)
    base, rules = Tower(Dropping), zoo.rules(r=4, dropout=p)
    pair = lora_fx.apply(base, rules, (X,), optimise=["compile"]), lora_fx.apply(base, rules, backend="modules")
    for model in pair:
        zoo.randomise_(model)
    assert_agree((pair[0].eval(), pair[1].eval()), (2, 6))
    assert report(pair[0]) == ({"compile"}, set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        assert_agree((pair[0].train(), pair[1].train()), (2, 6), (3, 5))
    reasons = report(pair[0])[1]
    assert not p or reasons == {
        "not compiled: dropouts of the model beside those of adapters would draw in another order"
    }


def with_dropout(self: Any, x: Tensor) -> Tensor:
    return self.end(x, F.dropout(x, 0.3, self.training), self.norm(x))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_dropouts_of_the_model_keep_their_random_numbers_or_are_not_compiled(p: float):
    pair = towers(with_dropout, dropout=p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        assert_agree(pair, (2, 6), (3, 5))


@pytest.mark.usefixtures("quick")
def test_the_compiler_can_be_reset_by_others():
    pair = towers()
    assert_agree(pair)
    torch._dynamo.reset()
    assert_agree(pair, (2, 6), (3, 5), (4, 5))
    assert compilations(pair[0]) == 2, "made again, from copies of a call"
    assert report(pair[0]) == ({"compile"}, set())
    for _ in range(3):
        torch._dynamo.reset()
        assert_agree(pair, (2, 6), (3, 5))
    assert "not compiled: torch compiles it again and again" in report(pair[0])[1]


def test_errors_of_the_compiler_are_a_reason_and_one_warning(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compiling, "inductor", fails)
    pair = towers()
    with pytest.warns(LoraFxWarning, match="runs without torch.compile: .*no C") as told:
        assert_agree(pair, (2, 6), (1, 4), (3, 6))
    assert len(told) == 1
    done, reasons = report(pair[0])
    assert done == set()
    assert all("no C++ compiler" in reason for reason in reasons)


@pytest.mark.usefixtures("quick")
def test_code_that_computes_something_else_is_given_up(monkeypatch: pytest.MonkeyPatch):
    written = compiling.Lifted.written

    def wrong(self: Any, *arguments: Any) -> Any:
        graph = written(self, *arguments)
        silu = next(node for node in graph.nodes if node.target is F.silu)
        silu.target = F.gelu
        silu.kwargs = {}
        return graph

    monkeypatch.setattr(compiling.Lifted, "written", wrong)
    pair = towers()
    with pytest.warns(LoraFxWarning, match="the result differs"):
        assert_agree(pair)
    assert report(pair[0]) == (set(), {"not compiled: the result differs"})


@pytest.mark.usefixtures("quick")
def test_threads_may_call_a_twin_while_another_has_it_compiled():
    pair = towers()
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(pair[0](X).detach())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, pair[1](X).detach(), rtol=1e-5, atol=1e-5)
    assert len(results) == 4


@pytest.mark.usefixtures("quick")
def test_settings_of_torch_stay_and_a_backward_pass_can_be_made_twice():
    before = torch._dynamo.config.save_config_portable(), torch._functorch.config.save_config_portable()
    random = torch.get_rng_state()
    pair = towers(dropout=0.1)
    torch.manual_seed(3)
    loss = pair[0](X).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert (torch._dynamo.config.save_config_portable(), torch._functorch.config.save_config_portable()) == before
    torch.set_rng_state(random)


@pytest.mark.usefixtures("quick")
def test_apply_compiles_nothing():
    torch._dynamo.utils.counters.clear()
    towers()
    assert not torch._dynamo.utils.counters["stats"]


def test_parts_of_a_weight_are_not_compiled():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return x + q * k + v

    rules = {
        "version": 1,
        "rules": [
            {"match": {"name": "**.qkv"}, "lora": {"r": 2}, "slices": {"of": ["q", "k", "v"], "adapt": ["q", "v"]}}
        ],
    }
    tuned = lora_fx.apply(nn.Sequential(Fused(), Fused()), rules, (X,), optimise=["compile"]).train()
    tuned(X).sum().backward()
    assert report(tuned) == (set(), {"not compiled: qkv is adapted in part"})


@pytest.mark.slow
def test_machine_code_gives_the_results_and_gradients_of_the_module_backend():
    pair = towers(dropout=0.1)
    assert_agree(pair, (2, 6), (3, 5), (2, 6))
    assert report(pair[0]) == ({"compile"}, set())
    assert compilations(pair[0]) == 2


@pytest.mark.slow
def test_machine_code_with_dropouts_of_the_model_draws_the_same_numbers():
    pair = towers(with_dropout)
    assert_agree(pair, (2, 6), (3, 5))
    assert report(pair[0]) == ({"compile"}, set())
