"""Rules, plans, graphs, adapters and checkpoints of others: whatever is changed in one, it is read, or refused by an error of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import campaigns, readings, spoiled

ROOT = Path(__file__).parents[2]
CASES = {
    "rules": readings.rules_case,
    "plans": readings.plan_case,
    "graphs": readings.graph_case,
    "adapters": spoiled.adapter_case,
    "checkpoints": spoiled.checkpoint_case,
}
SHORT = {"rules": 1500, "plans": 300, "graphs": 300, "adapters": 200, "checkpoints": 80}
LONG = {"rules": 100_000, "plans": 20_000, "graphs": 20_000, "adapters": 200_000, "checkpoints": 20_000}
with_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="some of the files are pipes")
KINDS = [pytest.param(what, marks=with_pipes) if what in ("adapters", "checkpoints") else what for what in CASES]


@pytest.mark.parametrize("what", KINDS)
def test_changed_files_are_read_or_refused_in_our_words(what):
    campaigns.run(CASES[what], range(10**9, 10**9 + SHORT[what]))


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(campaigns.PARTS))
@pytest.mark.parametrize("what", KINDS)
def test_many_changed_files_are_read_or_refused_in_our_words(what, part, record_property):
    record_property("figures", campaigns.run(CASES[what], campaigns.long_run(part, LONG[what])))


def test_a_campaign_tells_the_seed_of_what_goes_wrong():
    def case(seed: int) -> bool:
        if seed == 7:
            raise ValueError("seven")
        return True

    assert campaigns.run(case, range(7)).startswith("7 cases, 7 of them read")
    with pytest.raises(ValueError, match="seven") as caught:
        campaigns.run(case, range(10))
    assert caught.value.__notes__ == ["seed 7"]


@pytest.mark.fuzz
def test_a_fuzzer_that_sees_which_lines_run_finds_nothing_else(tmp_path, record_property):
    pytest.importorskip("atheris")
    runs = os.environ.get("LORA_FX_FUZZ_CASES", "20000")
    for name, text in readings.texts().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "tests.support.guided",
        f"-runs={runs}",
        "-max_len=16384",
        "-verbosity=0",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record_property("figures", f"atheris: {runs} runs")
