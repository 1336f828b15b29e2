"""Arguments of the wrong kind: each is told by its name, and nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.errors import CaptureError
from tests.support.twoadapters import BOTH, model, two, values


def rows(tuned, adapters, **options):
    with lora_fx.rows(tuned, adapters, **options):
        return


CASES = {
    "use a number": (lambda t: lora_fx.use(t, 3), "adapters must be a name.*found int"),
    "use bytes": (lambda t: lora_fx.use(t, b"a"), "adapters must be a name.*found bytes"),
    "use lists": (lambda t: lora_fx.use(t, [["a"]]), r"no adapter is called \['a'\]"),
    "use twice": (lambda t: lora_fx.use(t, iter(["a", "a"])), "named twice: a, a"),
    "use a weight that is none": (lambda t: lora_fx.use(t, {"a": "x"}), "finite numbers: a: 'x'"),
    "use a weight beyond float": (lambda t: lora_fx.use(t, {"a": 10**400}), "finite numbers: a"),
    "use infinity": (lambda t: lora_fx.use(t, {"a": np.float32("inf")}), "finite numbers: a"),
    "a rate of infinity": (lambda t: lora_fx.param_groups(t, lr=np.float16("inf")), "lr is np.float16"),
    "rows of one that is not there": (lambda t: rows(t, ["x"] * 3), "no adapter is called 'x'; there are"),
    "merge a number": (lambda t: lora_fx.merge(t, adapters=3), "adapters must be a name.*found int"),
    "rows of a number": (lambda t: rows(t, 3), "must be a sequence.*found int"),
    "rows of a dict": (lambda t: rows(t, {"a": 1}), "must be a sequence.*found dict"),
    "rows of a set": (lambda t: rows(t, {"a", "b"}), "must be a sequence.*found set"),
    "rows of lists": (lambda t: rows(t, [["a"]]), r"no adapter is called \['a'\]"),
    "rows along True": (lambda t: rows(t, ["a"], dim=True), "dim is True"),
    "add under a number": (lambda t: lora_fx.add(t, BOTH, adapter=3), "cannot be called 3"),
    "add under a list": (lambda t: lora_fx.add(t, BOTH, adapter=["c"]), r"cannot be called \['c'\]"),
    "add trained perhaps": (lambda t: lora_fx.add(t, BOTH, adapter="c", trainable="no"), "trainable is 'no'"),
    "drop a list": (lambda t: lora_fx.drop(t, ["a"]), r"no adapter is called \['a'\]"),
    "rename to None": (lambda t: lora_fx.rename(t, "a", None), "cannot be called None"),
    "swap with a number": (lambda t: lora_fx.swap(t, 3, adapter="a"), "must be a path, found int"),
    "swap with bytes": (lambda t: lora_fx.swap(t, b"x", adapter="a"), "must be a path, found bytes"),
    "swap with numbers for names": (
        lambda t: lora_fx.swap(t, {1: torch.ones(2)}, adapter="a"),
        "keys of this one are no",
    ),
    "load a number": (lambda _: lora_fx.load(model(), 3), "must be a path, found int"),
    "save to a number": (lambda t: lora_fx.save(t, 3), "must be a path, found int"),
    "a rate of None": (lambda t: lora_fx.param_groups(t, lr=None), "lr is None"),
    "a rate of True": (lambda t: lora_fx.param_groups(t, lr=True), "lr is True"),
    "a ratio in words": (lambda t: lora_fx.param_groups(t, lr=1e-3, lora_plus="x"), "lora_plus is 'x'"),
    "a decay of None": (lambda t: lora_fx.param_groups(t, lr=1e-3, weight_decay=None), "weight_decay is None"),
    "rates that are one": (lambda _: lora_fx.recipe(model(), "instruction", data=[], rates=3), "rates is 3"),
    "a loss that is none": (
        lambda _: lora_fx.recipe(model(), "instruction", data=[], loss=3),
        "loss must be a function",
    ),
    "a budget in words": (lambda _: lora_fx.allocate(model(), BOTH, budget="x"), "budget is 'x'"),
    "ranks by no loss": (lambda _: lora_fx.allocate(model(), BOTH, data=[], loss=3), "loss must be a function"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_of_the_wrong_kind_is_told_and_changes_nothing(case):
    call, told = CASES[case]
    tuned = two()
    before, used = values(tuned), [(one.name, one.active) for one in lora_fx.list_adapters(tuned)]
    with pytest.raises(ValueError, match=told):
        call(tuned)
    after = values(tuned)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [(one.name, one.active) for one in lora_fx.list_adapters(tuned)] == used


def test_ranks_of_a_file_that_is_padded_are_whole(tmp_path):
    tuned = two()
    lora_fx.save(tuned, tmp_path, adapter="a")
    for rank in ("x", 2.5, True, 0):
        with pytest.raises(ValueError, match=f"rank is {rank!r}; it must be a rank"):
            lora_fx.add(tuned, tmp_path, adapter="c", rank=rank)
    assert [one.name for one in lora_fx.list_adapters(tuned)] == ["a", "b"]


def test_data_that_is_one_batch_or_none_is_told():
    for data in (3, {"x": torch.ones(1)}, torch.ones(1), (torch.ones(1),)):
        with pytest.raises(CaptureError, match="no iterable of batches"):
            lora_fx.recipe(model(), "instruction", data=data)
        with pytest.raises(CaptureError, match="no iterable of batches"):
            lora_fx.allocate(model(), BOTH, data=data)


def test_what_is_no_module_is_told():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, found int"):
        lora_fx.allocate(3, BOTH)


def test_torchs_own_rates_are_taken():
    tuned = two()
    rate = torch.tensor(1e-3)
    groups = lora_fx.param_groups(tuned, lr=rate, weight_decay=torch.tensor(0.1))
    assert all(group["lr"] == rate for group in groups)
    assert {float(group["weight_decay"]) for group in groups} <= {0.0, float(torch.tensor(0.1))}
