"""Threads that call a model while another changes it: each call sees one state, and nobody waits for ever."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.models.between import between_calls
from tests.support import faultcases
from tests.support.endurance import running, threads_at_once
from tests.support.killing import fork
from tests.support.zoo import features


class Slow(nn.Module):
    """A model that shows when a call has begun, and ends it when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.begun, self.go_on = [], []

    def forward(self, x):
        self.begun[-1].set()
        assert self.go_on[-1].wait(20)
        return self.inner(x)


def called(model: nn.Module, done: list[str], name: str = "call") -> threading.Thread:
    def call() -> None:
        model(torch.zeros(1, 2))
        done.append(name)

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def in_a_call() -> tuple[Slow, list[str], threading.Thread]:
    """Return a model, what is done with it, and a thread whose call of it has begun."""
    model, done = Slow(), []
    model.begun.append(threading.Event())
    model.go_on.append(threading.Event())
    first = called(model, done)
    assert model.begun[0].wait(20)
    return model, done, first


def test_a_change_waits_for_calls_that_run_and_calls_that_begin_wait_for_it():
    model, done, first = in_a_call()

    def change() -> None:
        with between_calls(model):
            done.append("change begins")
            late.append(called(model, done, "late call"))
            time.sleep(0.05)
            done.append("change ends")

    late: list[threading.Thread] = []
    changing = threading.Thread(target=change)
    changing.start()
    time.sleep(0.05)
    assert done == []
    model.go_on[0].set()
    for thread in (first, changing):
        thread.join(20)
    late[0].join(20)
    assert [one for one in done if one != "call"] == ["change begins", "change ends", "late call"]
    assert "call" in done
    assert not model._forward_pre_hooks


def test_a_change_inside_of_a_call_or_of_another_change_does_not_wait_for_itself():
    model, idle = nn.Sequential(nn.Linear(2, 2)), threading.Event()
    other = threading.Thread(target=idle.wait)
    other.start()
    seen = []

    def hook(module: nn.Module, _: object) -> None:
        with between_calls(module):
            seen.append("in a call")

    handle = model.register_forward_pre_hook(hook)
    model(torch.zeros(1, 2))
    handle.remove()
    with between_calls(model), between_calls(model), between_calls(nn.Linear(1, 1)):
        model(torch.zeros(1, 2))
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        seen.append("in a change")
    found = [thread for one in copies for thread in [called(one, seen)]]
    for thread in found:
        thread.join(20)
    idle.set()
    other.join()
    assert seen == ["in a call", "in a change", "call", "call"]


def test_a_call_that_runs_already_passes_through_to_its_parts():
    model, done, first = in_a_call()

    def change() -> None:
        with between_calls(model, [model.inner]):
            done.append("change")

    changing = threading.Thread(target=change)
    changing.start()
    time.sleep(0.05)
    assert done == []
    model.go_on[0].set()
    first.join(20)
    changing.join(20)
    assert sorted(done) == ["call", "change"]


def test_a_call_for_which_a_change_waits_may_change_another_model_and_ask_its_own():
    """What waits for a call must not hold what the call needs: nothing would ever end."""
    model, other, done, first = faultcases.graph_module(), nn.Linear(1, 1), [], threading.Event()

    def hook(*_: object) -> None:
        first.set()
        time.sleep(0.05)  # now the other thread waits for this call
        with between_calls(other), lora_fx.use(model, None):
            done.append("changed in a call")

    def change() -> None:
        lora_fx.use(model, None)
        done.append("changed")

    handle = model.register_forward_pre_hook(hook)
    calling = threading.Thread(target=lambda: model(features(2, 3)), daemon=True)
    changing = threading.Thread(target=change, daemon=True)
    calling.start()
    assert first.wait(20)
    changing.start()
    for thread in (calling, changing):
        thread.join(20)
        assert not thread.is_alive(), "they wait for each other"
    handle.remove()
    assert done == ["changed in a call", "changed"]
    assert not model._forward_pre_hooks


def test_a_change_comes_through_where_a_part_is_called_again_and_again():
    class Sleepy(nn.Module):
        def forward(self) -> None:
            time.sleep(0.005)

    model, stop = nn.Sequential(Sleepy()), threading.Event()

    def calls() -> None:
        while not stop.is_set():
            model[0]()

    def change() -> None:
        for _ in range(5):
            with between_calls(model):
                changes.append(1)

    changes: list[int] = []
    calling, changing = threading.Thread(target=calls), threading.Thread(target=change, daemon=True)
    calling.start()
    changing.start()
    changing.join(5)
    stop.set()
    calling.join(20)
    assert changes == [1] * 5
    assert not model[0]._forward_pre_hooks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_is_forked_during_a_change_does_not_wait_for_it():
    model, begun, end = nn.Linear(2, 2), threading.Event(), threading.Event()

    def change() -> None:
        with between_calls(model):
            begun.set()
            assert end.wait(20)

    changing = threading.Thread(target=change)
    changing.start()
    assert begun.wait(20)
    child = fork()
    if not child:
        ended = []

        def work() -> None:
            model(torch.zeros(1, 2))
            with between_calls(model):
                ended.append(1)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(5)
        os._exit(0 if ended else 1)
    status = os.waitpid(child, 0)[1]
    end.set()
    changing.join(20)
    assert os.waitstatus_to_exitcode(status) == 0


def test_no_call_mixes_two_states_of_an_adapted_model(tmp_path):
    found = threads_at_once(3, 3, tmp_path)
    assert {name: served.mixed for name, served in found.items()} == {name: [] for name in found}
    assert all(served.calls and served.changes == 3 for served in found.values())


def test_what_is_saved_or_merged_while_another_thread_swaps_is_one_of_the_two(tmp_path):
    tuned = copy.deepcopy(faultcases.adapted())
    wholes = {}
    for name, scale in (("one", 1.0), ("two", 2.0)):
        with torch.no_grad():
            for parameter in lora_fx.parameters(tuned, "plain"):
                parameter.mul_(scale)
        lora_fx.save(tuned, tmp_path / name, adapter="plain")
        wholes[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for name in wholes:
                lora_fx.swap(tuned, tmp_path / name, adapter="plain")

    saved = set()
    for _ in running([threading.Thread(target=swap)], stop):
        for _ in range(12):
            lora_fx.save(tuned, tmp_path / "now", adapter="plain")
            saved.add((tmp_path / "now" / "adapter_model.safetensors").read_bytes())
    assert saved <= {*wholes.values()}
