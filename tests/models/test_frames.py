"""Frames of threads that run are looked at with no collection of garbage, and stay what they are."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lora_fx.models import frames
from tests.support.killing import fork


class Waiting(nn.Module):
    """A model whose call begins, and goes on when it is told to; the frames of the call are there meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        self.begun.set()
        assert self.go_on.wait(20)
        return x


@pytest.fixture
def called() -> Iterator[tuple[Waiting, threading.Thread]]:
    model = Waiting()
    thread = threading.Thread(target=model, args=(torch.zeros(2),))
    thread.start()
    assert model.begun.wait(20)
    yield model, thread
    model.go_on.set()
    thread.join(20)


def frame_of_the_call(thread: threading.Thread):
    frame = sys._current_frames()[thread.ident]
    while not frames._is_call(frame):
        frame = frame.f_back
    return frame


@pytest.fixture
def collected(monkeypatch) -> list[bool]:
    """Whether garbage could be collected, each time that frames are asked for."""
    seen, real = [], sys._current_frames
    monkeypatch.setattr(sys, "_current_frames", lambda: (seen.append(gc.isenabled()), real())[1])
    return seen


def test_a_call_of_another_thread_is_found_until_it_ends(called):
    model, thread = called
    modules = frozenset([id(model)])
    for _ in range(3):
        assert frames.calls_in_threads(modules, but=()) == [model]
    assert frames.calls_in_threads(modules, but=[thread.ident]) == []
    assert frames.calls_in_threads(frozenset(), but=()) == []
    model.go_on.set()
    thread.join(20)
    assert frames.calls_in_threads(modules, but=()) == []


def test_garbage_is_not_collected_while_frames_are_asked_for_and_is_again_afterwards(called, collected):
    model, _ = called
    assert not frames.is_one_thread()
    assert frames.calls_in_threads(frozenset([id(model)]), but=()) == [model]
    assert collected == [False, False]
    assert gc.isenabled()


def test_who_has_switched_collection_off_finds_it_off(collected):
    gc.disable()
    try:
        frames.is_one_thread()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_leaves_collection_on_and_the_next_look_is_possible(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "_current_frames", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            frames.is_one_thread()
    assert gc.isenabled()
    other = threading.Thread(target=frames.is_one_thread)
    other.start()
    other.join(20)
    assert not other.is_alive()


def test_values_of_the_last_look_stay_until_the_next_has_its_own(called):
    model, thread = called
    for _ in range(3):
        assert frames.calls_in_threads(frozenset([id(model)]), but=()) == [model]
        values = frame_of_the_call(thread).f_locals
        assert values["self"] is model
        if sys.version_info < (3, 13):  # until then one dict, whoever asks
            assert values[frames._KEPT]["self"] is model
            assert frames._KEPT not in values[frames._KEPT], "not those of all looks"


@pytest.mark.parametrize("set_hook", [sys.setprofile, sys.settrace])
def test_a_call_that_is_traced_keeps_its_locals(set_hook):
    model, wrong = nn.Identity(), []
    begun, go_on = threading.Event(), threading.Event()

    def seen(frame, event, _):
        if event == "call" and frames._is_call(frame) and not begun.is_set():
            begun.set()
            go_on.wait(20)

    def call() -> None:
        set_hook(seen)
        try:
            assert torch.equal(model(torch.ones(2)), torch.ones(2))
        except Exception as error:
            wrong.append(error)
        finally:
            set_hook(None)

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(20)
    assert frames.calls_in_threads(frozenset([id(model)]), but=()) == [model]
    go_on.set()
    thread.join(20)
    assert wrong == []


def test_a_thread_is_looked_at_again_where_a_generator_has_yielded_meanwhile(called, monkeypatch):
    model, thread = called
    real, asked = sys._current_frames, []
    suspended = (None for _ in range(2))
    next(suspended)

    def cut_off_at_first():
        asked.append(1)
        return {**real(), thread.ident: suspended.gi_frame} if len(asked) == 1 else real()

    monkeypatch.setattr(sys, "_current_frames", cut_off_at_first)
    assert frames.calls_in_threads(frozenset([id(model)]), but=()) == [model]
    assert len(asked) == 2
    monkeypatch.setattr(sys, "_current_frames", lambda: {thread.ident: suspended.gi_frame})
    assert frames.calls_in_threads(frozenset([id(model)]), but=()) == [], "a thread may begin with a generator"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_is_forked_while_another_thread_looks_can_look_too(monkeypatch):
    real, looking = sys._current_frames, threading.Event()

    def slow():
        looking.set()
        time.sleep(0.2)
        return real()

    monkeypatch.setattr(sys, "_current_frames", slow)
    other = threading.Thread(target=frames.is_one_thread)
    other.start()
    assert looking.wait(20)
    child = fork()
    if not child:
        code = 1
        try:
            code = 0 if frames.is_one_thread() and gc.isenabled() else 1
        finally:
            os._exit(code)
    other.join(20)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
