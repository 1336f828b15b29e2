"""What is trained as a state dict, for checkpoints of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import AdapterMismatchError, RefusedError
from tests.support.twoadapters import two, values

RULES = {"rules": [{"match": {"name": "*.up"}, "lora": {"r": 2}, "expect": 2}], "train": ["head"]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.up(x))


class Whole(nn.Module):
    """Two blocks and a head with running statistics, which is trained whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block(), Block()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.head(self.b(self.a(x)))


@pytest.fixture
def tuned():
    torch.manual_seed(0)
    tuned = lora_fx.apply(Whole(), RULES, backend="modules")
    for parameter in lora_fx.parameters(tuned):
        nn.init.normal_(parameter)
    tuned.train()(torch.randn(8, 4))  # moves the running statistics
    return tuned


@pytest.fixture
def other():
    torch.manual_seed(0)
    return lora_fx.apply(Whole(), RULES, backend="modules")


def test_state_has_what_is_trained_under_the_names_of_the_model_and_no_more(tuned):
    state = lora_fx.adapter_state(tuned)
    whole = tuned.state_dict()
    trained = [f"head.0.{name}" for name in ("weight", "bias")] + [f"head.1.{name}" for name in ("weight", "bias")]
    factors = [f"{block}.up.lora_{factor}.default.weight" for block in "ab" for factor in "AB"]
    statistics = [f"head.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    assert sorted(state) == sorted([*trained, *factors, *statistics])
    assert all(torch.equal(state[name], whole[name]) for name in state)
    assert sum(tensor.numel() for name, tensor in state.items() if name not in statistics) == sum(
        parameter.numel() for parameter in lora_fx.parameters(tuned)
    )


def test_state_comes_back_bit_by_bit_also_through_a_file(tuned, other, tmp_path):
    torch.save(lora_fx.adapter_state(tuned), tmp_path / "state.pt")
    lora_fx.load_adapter_state(other, torch.load(tmp_path / "state.pt"))
    x = torch.randn(3, 4)
    assert torch.equal(other.eval()(x), tuned.eval()(x))
    assert all(map(torch.equal, lora_fx.adapter_state(other).values(), lora_fx.adapter_state(tuned).values()))


def test_names_are_the_same_behind_a_wrapper(tuned, other):
    wrapped = nn.DataParallel(other)
    assert set(lora_fx.adapter_state(wrapped)) == set(lora_fx.adapter_state(tuned))
    lora_fx.load_adapter_state(wrapped, lora_fx.adapter_state(tuned))
    assert torch.equal(other.a.up.lora_B["default"].weight, tuned.a.up.lora_B["default"].weight)


def test_everything_that_does_not_fit_is_named_at_once_and_nothing_is_loaded(tuned, other):
    state = {name: tensor.clone() for name, tensor in lora_fx.adapter_state(tuned).items()}
    del state["a.up.lora_A.default.weight"]
    state["elsewhere"] = torch.zeros(2)
    state["head.0.weight"] = torch.zeros(5, 4)
    state["head.0.bias"] = state["head.0.bias"].double()
    state["head.1.bias"] = torch.full((4,), torch.nan)
    state["b.up.lora_A.default.weight"] = [1.0]
    before = {name: tensor.clone() for name, tensor in lora_fx.adapter_state(other).items()}
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load_adapter_state(other, state)
    assert sorted(caught.value.mismatches) == [
        ("a.up.lora_A.default.weight", "has none", "float32 [2, 4] on cpu"),
        ("b.up.lora_A.default.weight", "a list", "float32 [2, 4] on cpu"),
        ("elsewhere", "float32 [2] on cpu", "has none"),
        ("head.0.bias", "float64 [4] on cpu", "float32 [4] on cpu"),
        ("head.0.weight", "float32 [5, 4] on cpu", "float32 [4, 4] on cpu"),
        ("head.1.bias", "NaN or infinite values", "float32 [4] on cpu"),
    ]
    assert all(map(torch.equal, lora_fx.adapter_state(other).values(), before.values()))


def test_state_of_one_adapter_is_its_own_alone_and_comes_back():
    tuned, other = two(), two()
    before = values(other)
    lora_fx.load_adapter_state(tuned, {n: 2 * v for n, v in lora_fx.adapter_state(tuned, adapter="b").items()}, "b")
    state = lora_fx.adapter_state(tuned, adapter="b")
    assert state
    assert set(state) == {name for name in before if ".b." in name}
    lora_fx.load_adapter_state(other, state, adapter="b")
    assert all(
        torch.equal(values(other)[name], tensor * (2 if ".b." in name else 1)) for name, tensor in before.items()
    )
    fresh = two()
    lora_fx.swap(fresh, state, adapter="b")
    assert all(torch.equal(values(fresh)[name], tensor) for name, tensor in values(other).items())
    assert set(lora_fx.adapter_state(tuned)) == {*state, *lora_fx.adapter_state(tuned, adapter="a")}


def test_state_of_one_adapter_has_what_is_trained_with_it():
    tuned = lora_fx.apply(Whole(), RULES, backend="modules")
    whole = set(lora_fx.adapter_state(tuned))
    assert set(lora_fx.adapter_state(tuned, adapter="default")) == whole
    rules = {"rules": [{"match": {"name": "a.up"}, "lora": {"r": 3, "bias": True}}], "train": ["head"]}
    lora_fx.add(tuned, rules, adapter="b")
    assert set(lora_fx.adapter_state(tuned, adapter="default")) == whole
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    at_head = {f"head.{at}.lora_trained.b.{name}" for at, _, name in (one.partition(".") for one in names)}
    own = {"a.up.lora_A.b.weight", "a.up.lora_B.b.weight", "a.up.lora_trained.b.bias"}
    assert set(lora_fx.adapter_state(tuned, adapter="b")) == own | at_head
    assert set(lora_fx.adapter_state(tuned)) == whole | own | at_head


def test_state_of_one_adapter_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="no adapter is called 'c'; there are a, b"):
        lora_fx.adapter_state(two(), adapter="c")
    with pytest.raises(ValueError, match="no adapter is called 'c'"):
        lora_fx.load_adapter_state(two(), {}, adapter="c")
    with pytest.raises(AdapterMismatchError, match="does not fit"):
        lora_fx.load_adapter_state(two(), lora_fx.adapter_state(two()), adapter="b")
    rules = [{"match": {"name": f"{block}.up"}, "lora": {"r": 2, "adapter": block}} for block in "ab"]
    together = lora_fx.apply(Whole(), {"rules": rules, "train": ["head"]}, backend="modules")
    with pytest.raises(RefusedError, match="was trained with a, b together"):
        lora_fx.adapter_state(together, adapter="a")


def test_model_that_is_not_adapted_has_no_such_state():
    for call in (lora_fx.adapter_state, lora_fx.print_trainable, lambda model: lora_fx.load_adapter_state(model, {})):
        with pytest.raises(RefusedError):
            call(Whole())


def test_number_of_trained_parameters_is_printed(tuned, capsys):
    lora_fx.print_trainable(tuned)
    assert capsys.readouterr().out == "trainable: 60 of 116 parameters (52 %)\n"
