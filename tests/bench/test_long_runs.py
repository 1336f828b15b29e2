"""What many steps leave over is counted: objects and caches, where memory would tell of other things too."""

from __future__ import annotations

import gc
import os
import sys

import pytest
import torch
from torch import nn

from lora_fx.regions import known
from tests.support.endurance import SUBJECTS, by_hand, free_tuples, kept_by, long_run, used

PACKAGES = "lora_fx", "torch"


def grown(folder, start=by_hand):
    """Return what there is more of after forty steps than after twenty."""
    first, last = long_run(41, folder, 21, start, look=lambda _: kept_by(PACKAGES))
    return {name: last[name] - count for name, count in first.items() if last[name] > count} | dict(last - first)


@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_is_left_over_by_steps_and_changes_of_adapters(tmp_path, name):
    assert grown(tmp_path, SUBJECTS[name]) == {}


def test_what_is_left_over_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "LEFT", [], raising=False)
    modules = []

    def careless(folder):
        subject = by_hand(folder)

        def change(step):
            subject.change(step)
            known.LEFT.append(step)
            modules.append(nn.Identity())

        return subject._replace(change=change)

    assert grown(tmp_path, careless) == {"torch.nn.modules.linear.Identity": 20, "lora_fx.regions.known.LEFT": 20}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks glibc")
def test_memory_in_use_is_what_is_held_and_not_what_python_keeps_for_later():
    gc.collect()
    before = used()
    held = [bytes(100) for _ in range(50_000)], torch.zeros(2_000_000)
    assert used() - before > 13_000_000
    del held
    assert abs(used() - before) < 100_000
    tuples = [tuple(range(length)) for length in (18, 19, 20) for _ in range(2_000)]
    del tuples
    if sys.implementation.name == "cpython":
        assert 4_000 < free_tuples() <= 40_000
    gc.collect()
    assert free_tuples() < 1_000
    assert abs(used() - before) < 100_000
