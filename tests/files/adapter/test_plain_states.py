"""A state with just the tensors of an adapter is copied in one step; all else is taken apart, and means the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.files.adapter.plainfile import plain_file_copies
from lora_fx.files.adapter.plainstate import plain_copies
from lora_fx.files.adapter.read import read_adapters
from lora_fx.models.restoring import write_together
from tests.support.twoadapters import WIDE, alone, given, model, two, values

STATE = {name: torch.randn_like(tensor) for name, tensor in lora_fx.adapter_state(alone(WIDE, "b")).items()}
FIRST = next(iter(STATE))


def with_wide() -> nn.Module:
    tuned = two()
    lora_fx.use(tuned, "b")
    return tuned


def test_what_is_copied_in_one_step_is_what_is_copied_one_by_one(monkeypatch):
    plain, slow = with_wide(), with_wide()
    assert plain_copies(plain, STATE, "b") is not None
    versions = {name: tensor._version for name, tensor in plain.named_parameters()}
    lora_fx.swap(plain, STATE, adapter="b")
    monkeypatch.setattr("lora_fx.files.adapter.swapping.plain_copies", lambda *_: None)
    lora_fx.swap(slow, STATE, adapter="b")
    assert torch.equal(plain(given()), slow(given()))
    assert all(torch.equal(tensor, slow.state_dict()[name]) for name, tensor in plain.state_dict().items())
    moved = {name for name, tensor in plain.named_parameters() if tensor._version > versions[name]}
    assert moved == {name for name in versions if ".b." in name}  # whoever kept one for a backward pass hears of it


CHANGES = {
    "a NaN": lambda state: state[FIRST].view(-1)[3:4].fill_(float("nan")),
    "an infinity that a sum of its row hides": lambda state: (
        state[FIRST].view(-1)[:2].copy_(torch.tensor([float("inf"), float("-inf")]))
    ),
    "another dtype": lambda state: state.update({FIRST: state[FIRST].bfloat16()}),
    "a lower rank": lambda state: state.update({FIRST: state[FIRST][:2]}),
    "a tensor that is missing": lambda state: state.pop(FIRST),
    "a tensor too much": lambda state: state.update(more=torch.zeros(2)),
    "no tensor": lambda state: state.update({FIRST: [1.0]}),
    "other strides": lambda state: state.update({FIRST: state[FIRST].t().contiguous().t()}),
    "no values": lambda state: state.update({FIRST: state[FIRST].to("meta")}),
    "two names": lambda state: state.update({FIRST.replace("default", "c"): state.pop(FIRST)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_taken_apart(change: str):
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    CHANGES[change](state)
    tuned = with_wide()
    before = values(tuned)
    assert plain_copies(tuned, state, "b") is None
    if change in ("another dtype", "a lower rank", "other strides"):
        lora_fx.swap(tuned, state, adapter="b")
        return
    with pytest.raises((lora_fx.AdapterMismatchError, ValueError)):
        lora_fx.swap(tuned, state, adapter="b")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())


def test_sums_that_overflow_are_no_infinite_values():
    tuned, state = with_wide(), {name: torch.full_like(tensor, 3e38) for name, tensor in STATE.items()}
    assert plain_copies(tuned, state, "b") is None
    lora_fx.swap(tuned, state, adapter="b")
    assert torch.equal(tuned.state_dict()[FIRST.replace("default", "b")], state[FIRST])


def test_lengths_are_copied_too_and_where_an_adapter_starts_is_not_forgotten():
    for init, is_plain in (({"dora": True, "init": "random"}, True), ({"init": "pissa"}, False)):
        rules = {"version": 1, "rules": [{"match": {"name": "**.q"}, "lora": {"r": 2, **init}}]}
        tuned, other = (lora_fx.apply(model(), rules, backend="modules") for _ in range(2))
        with torch.no_grad():
            for parameter in lora_fx.parameters(other):
                parameter.add_(torch.randn_like(parameter))
        state = lora_fx.adapter_state(other)
        assert (plain_copies(tuned, state, "default") is not None) is is_plain
        lora_fx.swap(tuned, state, adapter="default")
        assert torch.equal(tuned(given()), other(given()))


@pytest.mark.parametrize("load", ["swap", "load_adapter_state"])
def test_values_that_lie_where_others_are_written_are_those_from_before(load: str):
    tuned = with_wide()
    state = lora_fx.adapter_state(tuned, "b")  # the model's own memory
    one, other = (f"blocks.{number}.k.lora_B.b.weight" for number in (0, 2))
    before = {name: tensor.clone() for name, tensor in state.items()}
    state[one], state[other] = state[other], state[one]
    if load == "swap":
        lora_fx.swap(tuned, state, adapter="b")
    else:
        lora_fx.load_adapter_state(tuned, state, adapter="b")
    expected = before | {one: before[other], other: before[one]}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lora_fx.adapter_state(tuned, "b").items())


FILES = {
    "as it is": (WIDE, True),
    "of a lower rank": ({"r": 2}, True),
    "of another scaling": ({"r": 3, "alpha": 5, "rslora": True}, True),
    "in half precision": (torch.bfloat16, True),
    "with lengths": ({"r": 3, "dora": True}, False),
    "of a higher rank": ({"r": 4}, False),
    "acting from a token on": ({"r": 3, "invocation": [1]}, False),
    "of an initialisation by parts": ({"r": 1, "init": "pissa"}, False),
    "of fewer sites": ("**.k", False),
}


@pytest.mark.parametrize("case", FILES)
def test_a_plain_file_is_written_as_what_is_taken_apart(case, tmp_path, monkeypatch):
    kind, is_plain = FILES[case]
    rules = WIDE
    if isinstance(kind, dict) and kind is not WIDE:
        rules = {"version": 1, "rules": [{"match": {"name": "**.{k,out}"}, "lora": {"init": "random", **kind}}]}
    elif isinstance(kind, str):
        rules = {"version": 1, "rules": [{"match": {"name": kind}, "lora": {"r": 3}}]}
    other = alone(rules, "b")
    if kind is torch.bfloat16:
        for name, tensor in lora_fx.adapter_state(other).items():
            path, _, _ = name.rpartition(".")
            other.get_submodule(path).weight = nn.Parameter(tensor.bfloat16())
    lora_fx.save(other, tmp_path)
    (file,) = read_adapters(tmp_path)
    assert (plain_file_copies(with_wide(), file, "b") is not None) is is_plain

    def swapped() -> dict[str, torch.Tensor] | str:
        tuned = with_wide()
        before = values(tuned)
        try:
            lora_fx.swap(tuned, tmp_path, adapter="b")
        except lora_fx.LoraFxError as error:
            assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
            return str(error)
        return values(tuned)

    found = swapped()
    monkeypatch.setattr("lora_fx.files.adapter.swapping.plain_file_copies", lambda *_: None)
    expected = swapped()
    assert isinstance(found, str) <= (not is_plain)
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
    else:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


CHANGED = {
    "dropped and added": lambda tuned: (lora_fx.drop(tuned, "b"), lora_fx.add(tuned, alone(WIDE, "b"), adapter="b")),
    "renamed and back": lambda tuned: (lora_fx.rename(tuned, "b", "c"), lora_fx.rename(tuned, "c", "b")),
    "another block": lambda tuned: setattr(tuned.blocks, "1", with_wide().blocks[1]),
    "another parameter": lambda tuned: setattr(
        tuned.blocks[0].k.lora_A["b"], "weight", nn.Parameter(torch.zeros(3, 6))
    ),
    "more adapters": lambda tuned: lora_fx.add(tuned, alone(WIDE, "b"), adapter="c"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_was_found_before_is_looked_for_again_where_the_model_has_changed(change: str):
    tuned = with_wide()
    lora_fx.swap(tuned, STATE, adapter="b")
    CHANGED[change](tuned)
    state = {name: tensor + 1 for name, tensor in STATE.items()}
    lora_fx.swap(tuned, state, adapter="b")
    own = lora_fx.adapter_state(tuned, "b")
    assert all(torch.equal(own[name.replace("default", "b")], tensor) for name, tensor in state.items())


def test_a_part_of_a_target_among_the_values_is_seen():
    whole = torch.arange(6.0)
    first, second = whole[:3], whole[3:]
    write_together([(first, whole[2:5]), (second, whole[1:4])])
    assert whole.tolist() == [2, 3, 4, 1, 2, 3]
