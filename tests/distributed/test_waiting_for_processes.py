"""Nobody waits for longer than is allowed for processes that share a group: a hang is an error that says where."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import forkserver

import pytest
import torch
import torch.distributed as dist

from tests.support import processes
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(not processes.FORKS, reason="there is no fork server here"),
    pytest.mark.slow,
]


def ranks(_folder):
    return dist.get_rank()


def waits(_folder):
    return threads_wait()


def threads_wait():
    time.sleep(3600)


def fails_alone(_folder):
    if dist.get_rank() == 0:
        raise ValueError("only here")
    time.sleep(3600)


def sums_what_another_does_not(_folder):
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))
    else:
        time.sleep(3600)


def refused(work, folder, seconds):
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        in_processes(2, work, folder, seconds=seconds)
    return str(caught.value), time.monotonic() - started


@pytest.fixture(autouse=True)
def _a_server_that_answers(tmp_path_factory):
    assert in_processes(2, ranks, tmp_path_factory.mktemp("first")) == [0, 1]


@pytest.mark.parametrize("work", [waits, sums_what_another_does_not])
def test_what_does_not_come_back_is_ended_and_its_stack_is_told(tmp_path, work):
    text, took = refused(work, tmp_path, 4)
    assert text.startswith("not back: [0, 1], exit codes: [-9, -9]")
    assert work.__name__ in text
    assert took < 15


def test_what_waits_for_one_that_has_failed_is_ended_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1)
    text, took = refused(fails_alone, tmp_path, 300)
    assert text.startswith("not back: [1], exit codes: [1, -9]")
    assert "ValueError: only here" in text
    assert took < 30


def test_a_fork_server_that_does_not_answer_is_ended_and_the_next_one_answers(tmp_path):
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGSTOP)
    text, took = refused(ranks, tmp_path, 2)
    assert text.startswith("no process was started in time: ")
    assert took < 15
    (tmp_path / "next").mkdir()
    assert in_processes(2, ranks, tmp_path / "next") == [0, 1]


def test_a_process_whose_server_stops_is_ended_all_the_same(tmp_path, monkeypatch):
    waited = processes._waited

    def stops(those, _end):
        monkeypatch.setattr(processes, "_waited", waited)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGSTOP)
        return [0]

    monkeypatch.setattr(processes, "_waited", stops)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"not back: \[0\]"):
        in_processes(2, waits, tmp_path, seconds=300)
    assert time.monotonic() - started < 60
