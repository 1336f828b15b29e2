"""Frames of threads that run are looked at with no collection of garbage, and keep nothing of being looked at."""

from __future__ import annotations

import gc
import os
import sys
import threading
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


def test_a_frame_keeps_no_values_of_having_been_looked_at(called):
    model, thread = called
    values = frame_of_the_call(thread).f_locals  # until Python 3.12 one dict, whoever asks
    assert values["self"] is model
    frames.calls_in_threads(frozenset([id(model)]), but=())
    if sys.version_info < (3, 13):
        assert values == {}
    assert frame_of_the_call(thread).f_locals["self"] is model


def test_what_a_debugger_writes_back_to_a_frame_stays_whole(called):
    model, thread = called
    frame = frame_of_the_call(thread)
    frame.f_trace = lambda *_: None
    values = frame.f_locals
    assert frames.calls_in_threads(frozenset([id(model)]), but=()) == [model]
    assert values["self"] is model


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_is_forked_while_another_thread_looks_can_look_too(monkeypatch):
    real, looking, end = sys._current_frames, threading.Event(), threading.Event()

    def slow():
        looking.set()
        end.wait(0.2)
        return real()

    monkeypatch.setattr(sys, "_current_frames", slow)
    other = threading.Thread(target=frames.is_one_thread)
    other.start()
    assert looking.wait(20)
    child = fork()
    if not child:
        os._exit(0 if frames.is_one_thread() and gc.isenabled() else 1)
    other.join(20)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
