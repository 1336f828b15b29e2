"""Other values for an adapter, in place: nothing is captured, and nothing changes if they do not fit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.adapters.dicts import KEPT, KEPT_TARGETS
from lora_fx.regions.install import regions
from tests.support.twoadapters import BACKENDS, BOTH, DORA, WIDE, alone, factors, given, model, two, values


def other(r: int = 3, alpha: float = 3.0, seed: int = 5, base: nn.Module | None = None, **lora) -> nn.Module:
    torch.manual_seed(seed)
    rule = {"match": {"name": "**.{k,out}"}, "lora": {"r": r, "alpha": alpha, "init": "random", **lora}}
    return lora_fx.apply(base or model(), {"version": 1, "rules": [rule]}, backend="modules")


@BACKENDS
def test_a_swapped_adapter_computes_what_its_file_computes(inputs, tmp_path):
    tuned, new = two(inputs), other()
    lora_fx.save(new, tmp_path)
    lora_fx.use(tuned, "b")
    addresses = {name: tensor.data_ptr() for name, tensor in tuned.state_dict().items()}
    before = {name: tensor for name, tensor in values(tuned).items() if ".b." not in name}
    lora_fx.swap(tuned, tmp_path, adapter="b")
    assert torch.equal(tuned(given()), alone_on(inputs, tmp_path)(given()))
    assert {name: tensor.data_ptr() for name, tensor in tuned.state_dict().items()} == addresses
    assert all(torch.equal(tuned.state_dict()[name], tensor) for name, tensor in before.items())
    assert sum(region.captures for _, _, region in regions(tuned)) == 0


def alone_on(inputs, folder):
    return lora_fx.load(model(), folder, inputs)


def test_a_lower_rank_is_filled_up_and_another_scaling_goes_into_b(tmp_path):
    tuned, new = two(), other(r=2, alpha=5.0)
    lora_fx.save(new, tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    lora_fx.use(tuned, "b")
    assert torch.allclose(tuned(given()), new(given()), atol=1e-6)
    B = factors(tuned, "b")["blocks.0.k.lora_B"]
    assert torch.equal(B[:, 2], torch.zeros(6))
    assert torch.equal(B[:, :2], new.blocks[0].k.lora_B["default"].weight * 2.5)


def test_another_scaling_is_not_rounded_to_the_half_precision_of_a_file(tmp_path):
    tuned, new = two(), other(r=2, alpha=0.7).bfloat16()
    lora_fx.save(new, tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    theirs = new.blocks[0].k.lora_B["default"].weight
    assert theirs.dtype == torch.bfloat16
    B = factors(tuned, "b")["blocks.0.k.lora_B"]
    torch.testing.assert_close(B[:, :2], theirs.float() * 0.35, rtol=1e-6, atol=0)


def test_a_slot_may_have_room_for_higher_ranks(tmp_path):
    tuned = two()
    lora_fx.drop(tuned, "b")
    source = other(r=2, alpha=5.0)
    lora_fx.add(tuned, source, adapter="b", rank=5)
    lora_fx.use(tuned, "b")
    assert torch.allclose(tuned(given()), source(given()), atol=1e-6)
    new = other(r=5, alpha=5.0, seed=6)
    lora_fx.save(new, tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    assert torch.allclose(tuned(given()), new(given()), atol=1e-6)
    with pytest.raises(ValueError, match="has rank 5"):
        lora_fx.add(tuned, new, adapter="c", rank=4)
    assert len(lora_fx.list_adapters(tuned)) == 2


def test_a_state_is_swapped_in_as_it_is():
    tuned, new = two(), other()
    lora_fx.swap(tuned, lora_fx.adapter_state(new), adapter="b")
    lora_fx.use(tuned, "b")
    assert torch.equal(tuned(given()), new(given()))
    lora_fx.swap(tuned, lora_fx.adapter_state(two()), adapter="b")
    assert torch.equal(tuned(given()), alone(WIDE, "b")(given()))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_a_state_costs_a_few_small_operations_for_each_tensor():
    tuned, state = two(), lora_fx.adapter_state(other())
    with Operations() as operations:
        lora_fx.swap(tuned, state, adapter="b")
    assert operations.number <= 2 * len(state) + 20  # each value is summed and copied


def spoiled(state, change):
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    return state


FIRST = "blocks.0.k.lora_A.default.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop(FIRST), "has none"),
        (lambda state: state.update(more=torch.zeros(1)), "more"),
        (lambda state: state[FIRST].fill_(float("nan")), "NaN"),
        (lambda state: state.update({FIRST: torch.zeros(4, 6)}), r"float32 \[4, 6\]"),
        (lambda state: state.update({FIRST: torch.zeros(3, 5)}), r"float32 \[3, 5\]"),
        (lambda state: state.update({FIRST: torch.zeros(3, 6).double()}), "float64"),
        (lambda state: state.update({FIRST: torch.zeros(3, 6).to(torch.float8_e4m3fn)}), "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False], ids=["at first", "after one that fits"])
def test_a_state_that_does_not_fit_changes_nothing(change, told, is_first):
    tuned = two()
    if not is_first:
        lora_fx.swap(tuned, lora_fx.adapter_state(other()), adapter="b")
    before = values(tuned)
    with pytest.raises(lora_fx.AdapterMismatchError, match=told):
        lora_fx.swap(tuned, spoiled(lora_fx.adapter_state(other()), change), adapter="b")
    assert all(torch.equal(tuned.state_dict()[name], tensor) for name, tensor in before.items())


def into_a_transposed_tensor(tuned):
    weight = tuned.blocks[0].k.lora_A["b"].weight
    weight.data = torch.zeros(weight.shape[::-1]).T


def into_another_dtype(tuned):
    weight = tuned.blocks[0].k.lora_A["b"].weight
    weight.data = weight.data.double()


def into_new_tensors(tuned):
    for name, weight in tuned.named_parameters():
        if ".b." in name:
            weight.data = torch.zeros_like(weight)


@pytest.mark.parametrize("change", [into_a_transposed_tensor, into_another_dtype, into_new_tensors])
def test_tensors_that_have_changed_since_the_last_swap_get_the_values_too(change):
    tuned, state = two(), lora_fx.adapter_state(other())
    lora_fx.swap(tuned, state, adapter="b")
    change(tuned)
    lora_fx.swap(tuned, state, adapter="b")
    for name, value in state.items():
        assert torch.equal(tuned.get_parameter(name.replace("default", "b")).float(), value), name


def test_a_module_with_the_adapter_that_came_since_the_last_swap_is_found():
    tuned, state = two(), lora_fx.adapter_state(other())
    lora_fx.swap(tuned, state, adapter="b")
    tuned.blocks[0].more = two().blocks[0].k
    with pytest.raises(lora_fx.AdapterMismatchError, match="has none"):
        lora_fx.swap(tuned, state, adapter="b")


def test_values_in_the_memory_of_other_tensors_of_the_adapter_are_read_before_they_are_written():
    tuned, state = two(), lora_fx.adapter_state(other())
    lora_fx.swap(tuned, state, adapter="b")
    own = {name.replace(".b.", ".default."): value for name, value in lora_fx.adapter_state(tuned, "b").items()}
    first, second = (f"blocks.{number}.k.lora_A.default.weight" for number in (0, 1))
    lora_fx.swap(tuned, own | {first: own[second], second: own[first]}, adapter="b")
    assert torch.equal(tuned.blocks[0].k.lora_A["b"].weight, state[second])
    assert torch.equal(tuned.blocks[1].k.lora_A["b"].weight, state[first])


def moved_base() -> nn.Module:
    base = model()
    with torch.no_grad():
        base.blocks[0].k.weight += 1
    return base


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: other(r=4), "rank 4"),
        (lambda: other(dora=True), "DoRA"),
        (lambda: alone(DORA, "b"), "has none"),
        (lambda: other(base=moved_base()), "another base"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(made, told, tmp_path):
    tuned = two()
    lora_fx.save(made(), tmp_path)
    before = values(tuned)
    with pytest.raises(lora_fx.AdapterMismatchError, match=told):
        lora_fx.swap(tuned, tmp_path, adapter="b")
    assert all(torch.equal(tuned.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("more", [{"bias": "all"}, {"bias": "lora_only"}, {"train": ["blocks.0.out"]}], ids=str)
def test_an_adapter_that_trains_more_than_its_factors_is_not_half_replaced(more):
    rules = {"rules": [{"match": {"name": "**.{q,k}"}, "lora": {"r": 2, "init": "random"}}]}
    tuned, plain = lora_fx.apply(model(), {**rules, **more}), lora_fx.apply(model(), rules)
    before = values(tuned)
    with pytest.raises(lora_fx.RefusedError, match="'default' trains it"):
        lora_fx.swap(tuned, lora_fx.adapter_state(plain), adapter="default")
    assert all(torch.equal(tuned.state_dict()[name], tensor) for name, tensor in before.items())


def test_biases_and_names_that_are_not_there_are_refused(tmp_path):
    lora_fx.save(other(bias=True), tmp_path / "bias")
    with pytest.raises(lora_fx.RefusedError, match="its bias is trained"):
        lora_fx.swap(two(), tmp_path / "bias", adapter="b")
    lora_fx.save(two(), tmp_path / "several")
    tuned = two()
    lora_fx.rename(tuned, "b", "c")
    with pytest.raises(ValueError, match="none is called 'c'"):
        lora_fx.swap(tuned, tmp_path / "several", adapter="c")
    with pytest.raises(ValueError, match="no adapter is called 'd'"):
        lora_fx.swap(two(), tmp_path / "several", adapter="d")


def test_of_several_in_a_directory_the_one_of_the_name_is_taken(tmp_path):
    source = two()
    lora_fx.save(source, tmp_path)
    tuned = two()
    lora_fx.swap(tuned, lora_fx.adapter_state(other()), adapter="b")
    lora_fx.swap(tuned, tmp_path, adapter="b")
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in tuned.state_dict().items())


def beside(rules) -> nn.Module:
    """Return a model with "a", and "b" by these rules."""
    tuned = alone(BOTH, "a")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, alone(rules, "b"), adapter="b")
    return tuned


@pytest.mark.parametrize(("rules", "kept"), [(WIDE, KEPT_TARGETS), (DORA, KEPT)], ids=["plain", "DoRA"])
def test_a_base_that_has_changed_since_the_last_swap_is_looked_at_anew(rules, kept, tmp_path):
    tuned, other = beside(rules), alone(rules, "b")
    lora_fx.save(other, tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    known = tuned.__dict__[kept]
    lora_fx.swap(tuned, tmp_path, adapter="b")
    assert tuned.__dict__[kept] is known
    for copied in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        empty = copied.__dict__[kept]
        assert not any(getattr(empty, name) for name in empty.__slots__)
        lora_fx.swap(copied, tmp_path, adapter="b")
    layer = tuned.blocks[0].k if rules is WIDE else tuned.blocks[0].q
    for plain in (lora_fx.remove(tuned), lora_fx.merge(tuned, adapters=["a", "b"])):
        assert b"lora_fx" not in pickle.dumps(plain), "whoever reads it need not have lora_fx"
    weight = layer._parameters["weight"]
    for change in (
        lambda: weight.data.add_(1),  # in place
        lambda: layer._parameters.update(weight=nn.Parameter(weight + 2, requires_grad=False)),
        lambda: setattr(weight, "data", weight + 3),
    ):
        before = weight.detach().clone()
        with torch.no_grad():
            change()
        with pytest.raises(lora_fx.AdapterMismatchError, match="trained on other values"):
            lora_fx.swap(tuned, tmp_path, adapter="b")
        weight.data = before
        layer._parameters["weight"] = weight
        lora_fx.swap(tuned, tmp_path, adapter="b")


def test_another_weight_in_the_memory_of_one_that_was_looked_at_is_looked_at_too(tmp_path):
    tuned, other = beside(DORA), alone(DORA, "b")
    lora_fx.save(other, tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    layer = tuned.blocks[0].q
    weight, memory = layer.weight, layer.weight.data
    weight.data = memory.clone()
    layer._parameters["weight"] = nn.Parameter(memory.add_(1), requires_grad=False)
    with pytest.raises(lora_fx.AdapterMismatchError, match="trained on other values"):
        lora_fx.swap(tuned, tmp_path, adapter="b")


def test_what_a_swap_keeps_of_the_base_moves_with_the_model(tmp_path):
    tuned = beside(DORA)
    lora_fx.save(alone(DORA, "b"), tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    tuned.double()
    kept = {id(parameter) for parameter in tuned.__dict__[KEPT].base.parameters()}
    assert kept <= {id(parameter) for parameter in tuned.parameters()}, "nothing of it is a second copy"
    lora_fx.swap(tuned, tmp_path, adapter="b")
