"""Whatever ends a change early, at any line and after any edit of a graph: the model is as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.models.restoring import all_or_nothing, write_together
from lora_fx.models.walking import modules_of
from tests.support import faultcases
from tests.support.faultcases import EDITING, at_edits, at_lines
from tests.support.faults import FAULTS, ends_at, lines, portrait

IN_PLACE = ("add, rules", "add, a file", "drop", "rename", "combine", "swap", "load_adapter_state", "GraphModule: add")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return faultcases.cases(tmp_path_factory.mktemp("faults"))


def test_a_fault_leaves_all_adapters_or_none_and_nothing_half_changed(cases):
    found = {name: at_lines(*cases[name], 3, seed=1) for name in IN_PLACE}
    assert {name: figures.changed for name, figures in found.items()} == {name: [] for name in IN_PLACE}
    assert all(figures.tried - figures.went_on >= 2 for figures in found.values())


def test_a_fault_after_any_edit_of_a_graph_leaves_the_module_as_it_was():
    found = {name: at_edits(*EDITING[name]) for name in ("apply", "ask (add)", "remove")}
    assert {name: figures.changed for name, figures in found.items()} == {name: [] for name in found}
    assert all(figures.tried >= 8 for figures in found.values())


@pytest.mark.slow
def test_a_fault_anywhere_leaves_the_model_of_every_function_as_it_was(cases):
    found = {name: at_lines(*case, 8, seed=2) for name, case in cases.items()}
    found |= {f"edits of {name}": at_edits(*case) for name, case in EDITING.items()}
    assert {name: figures.changed for name, figures in found.items()} == {name: [] for name in found}


def test_values_are_written_all_or_none_whichever_line_a_fault_is_at():
    def pairs():
        return [(torch.zeros(3), torch.ones(3)), (torch.zeros(2, 2), torch.ones(2, 2))]

    total = lines(lambda: write_together(pairs()))
    ended = 0
    for line in range(1, total + 1):
        given = pairs()
        ended += ends_at(line, lambda given=given: write_together(given), FAULTS[line % 3]).ended
        assert len({bool(target.any()) for target, _ in given}) == 1
    assert ended >= 8


def test_what_a_change_has_done_to_a_model_is_undone_in_its_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)
    before, keys = portrait(model), [*model.state_dict()]

    def change() -> None:
        with all_or_nothing(modules_of(model)):
            first = model._modules.pop("0")
            model.add_module("0", first)
            model.note, model[1].training = "new", False
            first._forward_hooks.clear()
            del first._parameters["bias"]
            first.__class__ = nn.Bilinear
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert portrait(model) == before
    assert [*model.state_dict()] == keys
    with all_or_nothing(modules_of(model)):
        model.note = "new"
    assert model.note == "new"


def test_the_check_sees_what_a_fault_leaves_half_done():
    def half(tuned: nn.Module) -> None:
        for parameter in lora_fx.parameters(tuned):
            parameter.data.mul_(2)
        lora_fx.inspect(tuned)

    assert at_lines(faultcases.adapted, half, 4).changed
    model = copy.deepcopy(faultcases.adapted())
    before = portrait(model)
    model.extra = 1
    assert portrait(model) != before
