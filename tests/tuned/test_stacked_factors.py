"""Stacked factors serve again while they are what the adapters hold, and are made anew whatever has changed those."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from lora_fx.adapters import rows as adapter_rows
from lora_fx.adapters import stacked as stacking
from tests.support.twoadapters import BACKENDS, WIDE, alone, two

MIXED = ["b", None, "a", "a"]


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, 6, generator=torch.Generator().manual_seed(2))


def frozen(inputs=None) -> nn.Module:
    return two(inputs).eval().requires_grad_(False)


def one_by_one(tuned: nn.Module, names: list[str | None]) -> Tensor:
    results = []
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            results.append(tuned(batch(len(names))[number : number + 1]))
    return torch.cat(results)


@pytest.fixture
def made(monkeypatch) -> list[object]:
    """What has been stacked."""
    found: list[object] = []
    plain = stacking.stacked

    def counting(names, factors):
        found.append(names)
        return plain(names, factors)

    monkeypatch.setattr(stacking, "stacked", counting)
    monkeypatch.setattr(adapter_rows, "stacked", counting)
    return found


SITES = 9
"""Layers of the model with an adapter: q, k and out in three blocks."""


@BACKENDS
def test_ten_contexts_stack_the_factors_of_frozen_adapters_once(inputs, made):
    tuned = frozen(inputs)
    for _ in range(10):
        with lora_fx.rows(tuned, MIXED), torch.no_grad():
            together = tuned(batch())
    assert len(made) == SITES
    assert_close(together, one_by_one(tuned, MIXED), atol=1e-6, rtol=1e-6)


def test_gradients_of_inputs_alone_stack_nothing_again(made):
    tuned, x = frozen(), batch().requires_grad_()
    for _ in range(3):
        with lora_fx.rows(tuned, MIXED):
            tuned(x).sum().backward()
    assert len(made) == SITES
    assert x.grad is not None


def test_the_factors_that_are_trained_are_stacked_in_every_step(made):
    tuned = two()
    for _ in range(3):
        with lora_fx.rows(tuned, MIXED):
            tuned(batch()).sum().backward()
    assert len(made) == 3 * SITES


def test_trained_factors_serve_again_without_gradients(made):
    tuned = two()
    for _ in range(3):
        with lora_fx.rows(tuned, MIXED), torch.no_grad():
            tuned(batch())
    assert len(made) == SITES


def step_fused(tuned: nn.Module) -> None:
    for parameter in lora_fx.parameters(tuned):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(lora_fx.parameters(tuned), lr=0.1, fused=True).step()


def step(tuned: nn.Module) -> None:
    for parameter in lora_fx.parameters(tuned):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(lora_fx.parameters(tuned), lr=0.1).step()


def factors(tuned: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in tuned.named_parameters() if "lora_" in name]


def written_to_data(tuned: nn.Module) -> None:
    for parameter in factors(tuned):
        parameter.data.mul_(-2)


def other_data(tuned: nn.Module) -> None:
    for parameter in factors(tuned):
        parameter.data = parameter.data * -2


def in_inference_mode(tuned: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in factors(tuned):
            parameter.mul_(-2)


def loaded(tuned: nn.Module) -> None:
    tuned.load_state_dict({name: -2 * value for name, value in tuned.state_dict().items() if "lora_" in name}, False)


def assigned(tuned: nn.Module) -> None:
    state = {name: -2 * value for name, value in tuned.state_dict().items() if "lora_" in name}
    tuned.load_state_dict(state, False, assign=True)


def swapped(tuned: nn.Module) -> None:
    torch.manual_seed(11)
    for name in ("a", "b"):
        state = {
            key: torch.randn_like(value) for key, value in lora_fx.adapter_state(tuned).items() if f".{name}." in key
        }
        lora_fx.swap(tuned, state, adapter=name)


def through_numpy(tuned: nn.Module) -> None:
    for parameter in factors(tuned):
        parameter.detach().numpy()[:] *= -2


CHANGES: list[Callable[[nn.Module], None]] = [
    step, step_fused, written_to_data, other_data, in_inference_mode, loaded, assigned, swapped, through_numpy,
]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_whatever_changes_a_factor_counts_in_the_next_context(changed, trained):
    tuned = two().requires_grad_(False)
    for parameter in factors(tuned):
        parameter.requires_grad_(trained)
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        before = tuned(batch())
    if changed in (step, step_fused) and not trained:
        for parameter in factors(tuned):
            parameter.requires_grad_(True)
    changed(tuned)
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, before, atol=1e-3)


@pytest.mark.parametrize("changed", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_a_trained_factor_counts_in_the_next_call(changed):
    tuned = two()
    with lora_fx.rows(tuned, MIXED):
        with torch.no_grad():
            before = tuned(batch())
        changed(tuned)
        with torch.no_grad():
            together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, before, atol=1e-3)


def test_another_scaling_counts():
    tuned = frozen()
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        tuned(batch())
    lora_fx.drop(tuned, "b")
    lora_fx.add(
        tuned, alone({**WIDE, "rules": [{**WIDE["rules"][0], "lora": {"r": 3, "alpha": 30}}]}, "b"), adapter="b"
    )
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED), atol=1e-6, rtol=1e-6)


def test_what_was_stacked_in_inference_mode_serves_where_gradients_are_computed():
    tuned, x = frozen(), batch().requires_grad_()
    with lora_fx.rows(tuned, MIXED), torch.inference_mode():
        tuned(batch())
    with lora_fx.rows(tuned, MIXED):
        tuned(x).sum().backward()
    assert x.grad is not None


def test_four_choices_are_kept_and_the_oldest_goes(made):
    tuned = frozen()
    choices = [["a", None], ["b", None], ["a", "b"], ["b", "a"]]
    for _ in range(2):
        for names in choices:
            with lora_fx.rows(tuned, names), torch.no_grad():
                tuned(batch(2))
    once = len(made)
    with lora_fx.rows(tuned, [None, "a"]), torch.no_grad():
        tuned(batch(2))
    with lora_fx.rows(tuned, choices[-1]), torch.no_grad():
        tuned(batch(2))
    assert once == 6 + 6 + 9 + 9
    assert len(made) == once + 6
    with lora_fx.rows(tuned, choices[0]), torch.no_grad():
        tuned(batch(2))
    assert len(made) == once + 12


def test_a_copy_and_a_dropped_adapter_have_nothing_of_it():
    tuned = frozen()
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        tuned(batch())
    assert len(stacking._KEPT[tuned]) == 1
    assert copy.deepcopy(tuned) not in stacking._KEPT
    lora_fx.drop(tuned, "b")
    assert tuned not in stacking._KEPT


def test_it_goes_with_its_model():
    tuned = frozen()
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        tuned(batch())
    gone = weakref.ref(tuned)
    del tuned
    gc.collect()
    assert gone() is None
    layer = lora_fx.apply(nn.Linear(6, 6), {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": 2}}]})
    layer.requires_grad_(False)
    with lora_fx.rows(layer, ["default", None]), torch.no_grad():
        layer(torch.randn(2, 6))
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_threads_with_the_same_choice_do_not_disturb_each_other():
    tuned = frozen()
    expected = one_by_one(tuned, MIXED)
    found: list[Tensor] = []

    def serve() -> None:
        for _ in range(5):
            with lora_fx.rows(tuned, MIXED), torch.no_grad():
                found.append(tuned(batch()))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for together in found:
        assert_close(together, expected, atol=1e-6, rtol=1e-6)


def test_one_thread_compares_while_another_stacks():
    kept, failed, layers = stacking.StackedFactors(), [], [nn.Identity() for _ in range(3000)]
    factors = {"a": stacking.Plain(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)}
    interval = sys.getswitchinterval()

    def compare() -> None:
        try:
            while worker.is_alive():
                kept.compare(trained_alone=True)
        except RuntimeError as error:
            failed.append(error)

    worker = threading.Thread(target=lambda: [kept.of(layer, ("a",), factors) for layer in layers])
    sys.setswitchinterval(1e-5)
    try:
        worker.start()
        compare()
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
