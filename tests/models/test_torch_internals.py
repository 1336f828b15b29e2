"""Private torch, pinned."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.models import together, torch_internals
from tests.support import zoo
from tests.support.zoo import rules


def test_private_torch_still_behaves_as_we_rely_on():
    fakes = torch_internals.Fakes()
    fake = fakes.tensor(torch.zeros(2, 5, 8), "x", [False, False, False])
    weight = nn.Parameter(torch.zeros(8, 8))
    with fakes.active():
        out = nn.functional.linear(fake, weight)
        wide = fake.shape[1] > 4
    assert isinstance(out, torch_internals.FakeTensor)
    assert wide
    sizes = [size for size in fake.shape if isinstance(size, torch.SymInt)]
    guards = fakes.guards(sizes, ["a", "b", "c"][: len(sizes)])
    assert "2 <= a" in guards
    assert "5 <= b" in guards
    assert "c == 8" in guards
    assert torch_internals.constant_of(fake.shape[2]) == 8
    assert all(isinstance(table, dict) for table in torch_internals.global_hook_tables())


def test_copies_of_exported_modules_say_nothing_of_torchs_own_classes():
    exported = torch.export.export(nn.Linear(4, 4), (torch.zeros(2, 4),)).module()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        twin = torch_internals.deepcopy(exported)
    assert heard == []
    assert torch.equal(twin(torch.ones(2, 4)), exported(torch.ones(2, 4)))


class Loud:
    """Warns when it is copied."""

    def __deepcopy__(self, memo):
        warnings.warn("loud", FutureWarning, stacklevel=1)
        return self


def test_copies_still_warn_of_everything_else():
    with pytest.warns(FutureWarning, match="loud"):
        torch_internals.deepcopy([Loud()])


def test_words_of_torch_to_itself_reach_nobody_who_adapts_an_exported_module():
    sample = (zoo.features(2, 3),)
    exported = torch.export.export(zoo.Mlp().eval(), sample).module()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        tuned = lora_fx.apply(exported, rules("**"), sample)
        assert lora_fx.diff(exported, tuned)
        with lora_fx.disabled(tuned):
            assert torch.equal(tuned(*sample), exported(*sample))
        lora_fx.merge(tuned)
        lora_fx.remove(tuned)
    assert heard == []


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "elsewhere"])
def test_groups_of_tensors_are_compared_value_by_value(on_cpu, monkeypatch):
    monkeypatch.setattr(together, "_on_cpu", lambda _: on_cpu)
    one = [torch.ones(3, 2), torch.zeros(4)]
    least = [torch.ones(3, 2), torch.full((4,), 1e-38)]
    nan = [torch.full((3, 2), float("nan")), torch.zeros(4)]
    bfloat = [tensor.bfloat16() for tensor in one]
    groups = [(one, one), (one, least), (nan, nan), (bfloat, bfloat), (one, [tensor.clone() for tensor in one])]
    assert together.all_equal(groups) == [True, False, False, True, True]
    assert together.all_equal([]) == []


def test_compiled_code_runs_uncompiled_where_it_may_be_stale_and_else_as_it_is():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(nn.Linear(4, 4), backend=backend)
    for is_stale, expected in ((True, 0), (False, 1)):
        stale = torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=is_stale)
        with stale, torch_internals.uncompiled_if_stale():
            compiled(torch.zeros(2, 4))
        assert len(compilations) == expected


def test_kinds_of_tensors_are_surely_the_same_only_where_all_that_copying_asks_of_them_is():
    check = torch_internals.kinds_checked([torch.zeros(2, 3), torch.zeros(4)])
    assert check([torch.ones(2, 3), torch.ones(4)])
    for other in (
        torch.ones(3, 2).T, torch.ones(2, 3).half(), torch.ones(2, 3, device="meta"), torch.ones(2, 3).to_sparse(),
        torch.ones(2, 4), torch.ones(6), torch.nn.Parameter(torch.ones(2, 3)),
    ):  # fmt: skip
        assert not check([other, torch.ones(4)])
    assert not torch_internals.kinds_checked([torch.zeros(2, dtype=torch.complex64)])(
        [torch.ones(2, dtype=torch.complex64).conj()]
    )
