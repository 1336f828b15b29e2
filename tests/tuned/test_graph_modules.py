"""GraphModules with several adapters: layers ask which are used, in place of nodes in the graph."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing import assert_close

import lora_fx
from lora_fx.passes.sites import lora_nodes
from lora_fx.passes.verify import verify
from tests.support.twoadapters import BOTH, DORA, WIDE, alone, given, model

DROPOUT = {"version": 1, "rules": [{"match": {"name": "**.k"}, "lora": {"r": 2, "dropout": 0.5, "init": "random"}}]}


class Functional(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.blocks = model().blocks

    def forward(self, x):  # torch.fx cannot pickle graphs of functions with annotations that are strings
        for block in self.blocks:
            x = x + block.out(torch.tanh(F.linear(x, block.q.weight, block.q.bias) * block.k(x)))
        return x


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = model().blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def traced() -> nn.Module:
    return fx.symbolic_trace(Called())


def functional() -> nn.Module:
    return fx.symbolic_trace(Functional())


def exported() -> nn.Module:
    return torch.export.export(Called(), (given(),)).module()


KINDS = pytest.mark.parametrize("base", [traced, functional, exported], ids=lambda kind: kind.__name__)


def adapted(base, rules=BOTH, name: str = "a") -> fx.GraphModule:
    torch.manual_seed(7 if name == "a" else 8)
    tuned = lora_fx.apply(base(), rules)
    assert isinstance(tuned, fx.GraphModule)
    assert next(lora_nodes(tuned), None) is not None
    return tuned


def two(base) -> fx.GraphModule:
    """Return a GraphModule with "a", which is used, and "b", which is not."""
    tuned = adapted(base)
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, adapted(base, WIDE, "b"), adapter="b")
    return tuned


def close(one: Tensor, other: Tensor) -> None:
    assert_close(one, other, atol=1e-6, rtol=1e-6)


@KINDS
def test_a_choice_is_computed_and_the_base_is_bit_equal(base):
    tuned = two(base)
    both = {"a": 0.5, "b": -0.3}
    for chosen in ("a", "b", both):
        lora_fx.use(tuned, chosen)
        close(tuned(given()), lora_fx.merge(tuned)(given()))
    lora_fx.use(tuned, "b")
    close(tuned(given()), alone(WIDE, "b")(given()))
    lora_fx.use(tuned, None)
    assert torch.equal(tuned(given()), base()(given()))


@KINDS
def test_a_single_adapter_is_weighted_and_taken_out(base):
    tuned = adapted(base)
    with lora_fx.use(tuned, {"default": 0.5}):
        half = tuned(given())
    close(half, lora_fx.merge(tuned, adapters={"default": 0.5})(given()))
    close(tuned(given()), alone(BOTH, "a")(given()))
    with lora_fx.use(tuned, None):
        assert torch.equal(tuned(given()), base()(given()))


@KINDS
@pytest.mark.parametrize("how", [lora_fx.disabled, lambda tuned: lora_fx.use(tuned, None)], ids=["disabled", "use"])
def test_other_threads_do_not_notice(base, how):
    tuned = two(base)
    expected = tuned(given())
    found: list[Tensor] = []
    with how(tuned):
        other = threading.Thread(target=lambda: found.append(tuned(given())))
        other.start()
        other.join()
        assert torch.equal(tuned(given()), base()(given()))
    assert torch.equal(found[0], expected)
    assert torch.equal(tuned(given()), expected)


@KINDS
def test_the_used_adapter_gets_its_gradients_and_the_other_none(base):
    tuned, plain = two(base), alone(WIDE, "b")
    lora_fx.use(tuned, "b")
    tuned(given()).square().sum().backward()
    plain(given()).square().sum().backward()
    found = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    expected = {name.replace(".default.", ".b."): p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", [functional, exported], ids=lambda kind: kind.__name__)
def test_weights_that_a_graph_reads_have_one_adapter_for_all_rows(base):
    tuned = two(base)
    with pytest.raises(lora_fx.RefusedError, match="code reads"), lora_fx.rows(tuned, ["b", None, "a", "a"]):
        pass


def test_each_row_has_an_adapter():
    tuned, names = two(traced), ["b", None, "a", "a"]
    with lora_fx.rows(tuned, names):
        together = tuned(given())
    for row, name in enumerate(names):
        with lora_fx.use(tuned, name):
            close(together[row], tuned(given())[row])


def pickled(tuned: nn.Module) -> nn.Module:
    read: nn.Module = pickle.loads(pickle.dumps(tuned))
    return read


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("base", "again"),
    [
        (traced, copy.deepcopy),
        (functional, copy.deepcopy),
        (exported, copy.deepcopy),
        (traced, pickled),
        (functional, pickled),
    ],
)  # torch pickles no exported module
def test_copies_and_pickles_go_on_asking(base, again, trained):
    tuned = two(base).requires_grad_(trained)
    with lora_fx.use(tuned, "b"):
        expected = tuned(given())
    twin = again(tuned)
    lora_fx.use(twin, "b")
    close(twin(given()), expected)
    lora_fx.use(twin, None)
    assert torch.equal(twin(given()), base()(given()))
    assert [one.name for one in lora_fx.list_adapters(twin)] == ["a", "b"]
    lora_fx.use(twin, {"b": 0.5})
    close(lora_fx.merge(twin)(given()), twin(given()))


@KINDS
def test_adapters_are_dropped_renamed_combined_and_swapped(base):
    tuned = two(base)
    lora_fx.combine(tuned, {"a": 1, "b": 0.5}, adapter="mix")
    with lora_fx.use(tuned, {"a": 1, "b": 0.5}):
        expected = tuned(given())
    lora_fx.use(tuned, "mix")
    close(tuned(given()), expected)
    lora_fx.drop(tuned, "a")
    lora_fx.rename(tuned, "mix", "whole")
    close(tuned(given()), expected)
    lora_fx.swap(tuned, lora_fx.adapter_state(adapted(base, WIDE, "a")), adapter="b")
    lora_fx.use(tuned, "b")
    close(tuned(given()), adapted(base, WIDE, "a")(given()))


def test_other_values_leave_the_nodes_of_a_graph_where_they_are():
    tuned = adapted(traced)
    lora_fx.swap(tuned, lora_fx.adapter_state(adapted(traced, name="b")), adapter="default")
    assert next(lora_nodes(tuned), None) is not None
    assert torch.equal(tuned(given()), adapted(traced, name="b")(given()))


@KINDS
def test_several_adapters_go_through_files(base, tmp_path):
    tuned = two(base)
    lora_fx.save(tuned, tmp_path)
    again = lora_fx.load(base(), tmp_path)
    for name in ("a", "b"):
        lora_fx.use(tuned, name)
        lora_fx.use(again, name)
        close(again(given()), tuned(given()))
    removed = lora_fx.remove(tuned)
    assert torch.equal(removed(given()), base()(given()))
    assert list(removed.state_dict()) == list(base().state_dict())


@KINDS
def test_merging_by_name_folds_that_one(base):
    tuned = two(base)
    close(lora_fx.merge(tuned, adapters="b")(given()), alone(WIDE, "b")(given()))
    close(lora_fx.merge(tuned)(given()), alone(BOTH, "a")(given()))


@pytest.mark.parametrize("rules", [DORA, DROPOUT], ids=["dora", "dropout"])
@KINDS
def test_other_kinds_ask_too(base, rules):
    tuned = adapted(base, rules)
    expected = tuned.eval()(given())
    with lora_fx.disabled(tuned.train()):
        assert torch.equal(tuned(given()), base()(given()))
    close(tuned.eval()(given()), expected)
    verify(tuned)


def test_exports_take_one_by_name():
    tuned = two(traced)
    program = torch.export.export(tuned, (given(),))
    close(program.module()(given()), tuned(given()))


def test_a_model_that_holds_a_graph_module_chooses_for_it():
    class Pipe(nn.Module):
        def __init__(self, unet: nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor) -> Tensor:
            return self.unet(x)

    pipe = Pipe(adapted(traced))
    with lora_fx.use(pipe, None):
        assert torch.equal(pipe(given()), model()(given()))
    with lora_fx.disabled(pipe):
        assert torch.equal(pipe(given()), model()(given()))


class Own(nn.Module):
    """Multiplies by a parameter of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(x @ self.first)


ALL = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2, "init": "random"}}]}
LAST = {"version": 1, "rules": [{"match": {"name": "last"}, "lora": {"r": 2, "init": "random"}}]}


def test_what_is_the_graph_modules_own_is_refused_by_name_before_anything_changes():
    tuned = lora_fx.apply(fx.symbolic_trace(Own()), ALL)
    code, expected = tuned.code, tuned(given())
    for change in (
        lambda: lora_fx.use(tuned, None),
        lambda: lora_fx.add(tuned, LAST, adapter="b"),
        lambda: lora_fx.rename(tuned, "default", "b"),
        lambda: lora_fx.rows(tuned, ["default"] * 4).__enter__(),
    ):
        with pytest.raises(lora_fx.RefusedError, match=r"first +its weight is the GraphModule's own"):
            change()
        assert tuned.code == code
    assert torch.equal(tuned(given()), expected)
    assert lora_fx.list_adapters(tuned)["default"].active
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(given()), Own()(given()))
    assert torch.equal(tuned(given()), expected)


def test_an_adapter_is_not_put_beside_others_at_a_graph_modules_own_weight():
    tuned = lora_fx.apply(fx.symbolic_trace(Own()), LAST)
    code = tuned.code
    with pytest.raises(lora_fx.RefusedError, match=r"first +its weight is the GraphModule's own"):
        lora_fx.add(tuned, ALL, adapter="b")
    assert tuned.code == code
    lora_fx.add(tuned, LAST, adapter="b")
    lora_fx.use(tuned, "b")
    close(tuned(given()), lora_fx.merge(tuned)(given()))


def test_an_adapter_for_each_call_stays_in_its_graph():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(torch.tanh(self.q(x)))

    rules = {"version": 1, "rules": [{"match": {"name": "q"}, "lora": {"r": 2, "init": "random"}, "per_call": True}]}
    tuned = lora_fx.apply(fx.symbolic_trace(Twice()), rules, (given(),))
    expected = tuned(given())
    with pytest.raises(lora_fx.RefusedError, match="an adapter for each call"):
        lora_fx.use(tuned, None)
    with lora_fx.disabled(tuned):
        assert not torch.equal(tuned(given()), expected)
    assert torch.equal(tuned(given()), expected)
