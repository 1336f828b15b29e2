"""Adapters and checkpoints of others: whatever is changed in one, it is read, or refused by an error of ours."""

from __future__ import annotations

import os

import pytest

from tests.support import campaigns, spoiled

CASES = {"adapters": spoiled.adapter_case, "checkpoints": spoiled.checkpoint_case}
SHORT, LONG = {"adapters": 200, "checkpoints": 80}, {"adapters": 200_000, "checkpoints": 20_000}
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="some of the files are pipes")


@pytest.mark.parametrize("what", CASES)
def test_spoiled_files_are_read_or_refused_in_our_words(what):
    campaigns.run(CASES[what], range(10**9, 10**9 + SHORT[what]))


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(campaigns.PARTS))
@pytest.mark.parametrize("what", CASES)
def test_many_spoiled_files_are_read_or_refused_in_our_words(what, part, record_property):
    record_property("figures", campaigns.run(CASES[what], campaigns.long_run(part, LONG[what])))
