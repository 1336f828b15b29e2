"""Threads that write a merged file: the calling one is among them, is told of all, and hears of errors of others."""

from __future__ import annotations

import threading

import pytest

from lora_fx.files.checkpoint.jobs import Job, Workers

CALLING = threading.main_thread()
AT_ONCE = 10
"""Seconds after which threads that wait for each other are taken not to run at once."""


def row(number, write):
    """Return jobs that are called by their numbers."""
    return (Job(str(n), n, lambda _, n=n: write(n)) for n in range(number))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_each_job_is_done_once_and_told_in_the_calling_thread(threads):
    done, told = [], []
    with Workers(threads) as workers:
        workers.run(row(100, done.append), lambda job, _: told.append((job.size, threading.current_thread())))
    assert sorted(done) == list(range(100))
    assert sorted(told, key=lambda pair: pair[0]) == [(n, CALLING) for n in range(100)]


def test_calling_thread_is_one_of_those_that_work_at_once():
    meeting, found = threading.Barrier(3), set()

    def write(_):
        found.add(threading.current_thread())
        meeting.wait(AT_ONCE)

    with Workers(3) as workers:
        workers.run(row(3, write), lambda *_: None)
    assert len(found) == 3
    assert CALLING in found


@pytest.mark.parametrize("of_caller", [True, False], ids=["calling", "other"])
def test_error_of_one_thread_is_raised_and_the_others_take_no_more_jobs(of_caller):
    meeting, after = threading.Barrier(2), []

    def write(n):
        if n > 1:
            after.append(n)
            return
        meeting.wait(AT_ONCE)
        if (threading.current_thread() is CALLING) == of_caller:
            raise ZeroDivisionError(n)

    with Workers(2) as workers:
        with pytest.raises(ZeroDivisionError):
            workers.run(row(10**9, write), lambda *_: None)
        done = len(after)
        workers.run(row(2, lambda _: meeting.wait(AT_ONCE)), lambda *_: None)  # both threads are still there
    assert len(after) == done


def test_error_of_the_one_who_is_told_ends_the_work():
    with Workers(2) as workers, pytest.raises(ZeroDivisionError):
        workers.run(row(10**9, lambda _: None), lambda *_: 1 / 0)


def test_jobs_that_cannot_be_made_are_an_error_whichever_thread_asked_for_them():
    def broken():
        yield from row(3, lambda _: None)
        raise ZeroDivisionError

    with Workers(2) as workers, pytest.raises(ZeroDivisionError):
        workers.run(broken(), lambda *_: None)
