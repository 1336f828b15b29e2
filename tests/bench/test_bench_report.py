"""The timing protocol, and what `lora-fx bench` prints, writes and draws.  No test looks at how long anything takes."""

from __future__ import annotations

import gc
import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_fx.bench import peer
from lora_fx.bench.counters import Counts, frozen_heap
from lora_fx.bench.facts import MachineFacts, Setting
from lora_fx.bench.picture import panels, report_html
from lora_fx.bench.report import BenchReport
from lora_fx.bench.run import BenchOptions, bench
from lora_fx.bench.subjects import AGAIN, FULL, LB, MODULES, OURS, PEFT
from lora_fx.bench.timing import Rounds, interval, order, summarised, timed
from lora_fx.progress.steps import running
from tests.cli.test_cli import imported_by
from tests.support.clitools import SMALL, run, small

# -- timing


def rounds_of(wall: list[list[float]], processor: list[list[float]] | None = None) -> Rounds:
    """Return rounds of the lower bound, its copy, and one subject."""
    spent = np.array(wall)
    return Rounds((LB, AGAIN, OURS), spent, spent if processor is None else np.array(processor))


def test_every_subject_is_first_and_last_equally_often():
    rounds = [order(number, 3) for number in range(6)]
    assert all(sorted(turn) == [0, 1, 2] for turn in rounds)
    for place in (0, -1):
        assert sorted(turn[place] for turn in rounds) == [0, 0, 1, 1, 2, 2]


def test_every_step_runs_once_in_a_round_after_the_warm_ups():
    ran: list[str] = []
    told: list[str] = []
    steps = {name: (lambda name=name: ran.append(name)) for name in "ab"}
    with running("bench", lambda done, total, what: told.append(what), 3):
        times = timed(steps, rounds=3, warm_ups=1)
    assert ran == ["a", "b", "a", "b", "b", "a", "b", "a"]
    assert times.wall.shape == times.processor.shape == (3, 2)
    assert told == [f"timing, {number} of 3 rounds" for number in range(4)]


def test_ratio_is_the_median_of_ratios_within_rounds():
    timing = summarised(rounds_of([[1, 1, 2], [10, 10, 30], [2, 2, 8]]), LB, AGAIN)
    ratio = timing.ratios[OURS]
    assert ratio.ratio == 3
    assert ratio.least == 2
    assert (ratio.low, ratio.high) == (2, 4)
    assert timing.ratios[LB].ratio == 1
    assert timing.ratios[LB].seconds == 2
    assert timing.void == ""


def test_disturbed_rounds_are_left_out_and_counted():
    wall = [[1, 1, 2], [1, 1, 9], [1, 1, 2]]
    timing = summarised(rounds_of(wall, [[1, 1, 2], [1, 1, 2], [1, 1, 2]]), LB, AGAIN)
    assert (timing.rounds, timing.discarded) == (3, 1)
    assert timing.ratios[OURS].high == 2


def test_sleeping_is_seen_as_a_disturbance():
    times = timed({"busy": lambda: sum(range(20_000)), "sleeping": lambda: time.sleep(0.02)}, rounds=1, warm_ups=0)
    assert list(times.calm()) == [False]


def test_rounds_of_another_device_are_not_judged_by_the_processors_time():
    rounds = replace(rounds_of([[1, 1, 2]], [[0.1, 0.1, 0.1]]), on_processor=False)
    assert summarised(rounds, LB, AGAIN).discarded == 0


def test_run_whose_two_lower_bounds_differ_is_void():
    timing = summarised(rounds_of([[1, 1.02, 2]]), LB, AGAIN)
    assert timing.void == "two copies of the lower bound differ: 1.020 [1.020, 1.020], where 1 ± 0.01 is asked for"
    assert summarised(rounds_of([[1, 1.009, 2]]), LB, AGAIN).void == ""


def test_run_that_was_disturbed_throughout_is_void():
    timing = summarised(rounds_of([[1, 1, 2]], [[0.5, 1, 2]]), LB, AGAIN)
    assert timing.void == "other processes disturbed every round"
    assert timing.ratios[OURS].ratio == 2


def test_interval_is_the_same_for_the_same_values_and_covers_their_median():
    values = np.random.default_rng(1).normal(1.05, 0.02, size=25)
    low, high = interval(values)
    assert (low, high) == interval(values)
    assert low < np.median(values) < high
    assert high - low < values.max() - values.min()


# -- reports


def report_of(*wall: list[float]) -> BenchReport:
    counts = {
        LB: Counts(2_000_000, 1000, 4000, 10),
        OURS: Counts(2_100_000, 1100, 5000, 20),
        PEFT: Counts(2_100_000, 2000, 8000, 30),
    }
    spent = np.array(wall or [[1.0, 1.0, 1.02, 1.1]])
    timing = summarised(Rounds((LB, AGAIN, OURS, PEFT), spent, spent), LB, AGAIN)
    setting = Setting("Small", "attention", 9, 6, 2304, "float32", ("int64 [2, 5]",), 10, ("graphs stood aside",))
    return BenchReport(setting, MachineFacts("cpu", "a <CPU>", 2, 1, "Linux", "3.11", "2.9"), counts, timing, 1e-7)


def test_report_as_text():
    assert str(report_of()) == (
        "Small · attention · 9 sites, 6 in graphs · 10 tokens · float32 · cpu · 1 thread\n"
        "\n"
        "           time [95 %]           min/min  processor  FLOPs    saved  peak   aten calls\n"
        "  LB       1 s                                       2 MFLOP  1 kB   4 kB   10\n"
        "  lora_fx  1.020 [1.020, 1.020]  1.020    1.020      1.050    1.100  1.250  2.000\n"
        "  PEFT     1.100 [1.100, 1.100]  1.100    1.100      1.050    2.000  2.000  3.000\n"
        "\n"
        "  LB: the frozen base with the gradient of its input; the rows below it are multiples of it\n"
        "  A/A control 1.000 [1.000, 1.000]; 0 of 1 round disturbed and left out\n"
        "  of the time that PEFT takes above LB, lora_fx takes 20 %\n"
        "  outputs and gradients of lora_fx and PEFT differ by 1.0e-07 of the largest value\n"
        "  note: graphs stood aside"
    )


def test_void_run_is_printed_as_void_with_its_numbers():
    report = report_of([1.0, 1.02, 1.02, 1.1])
    assert "\n  VOID: two copies of the lower bound differ" in str(report)
    assert "1.100 [1.100, 1.100]" in str(report)
    assert json.loads(report.to_json())["timing"]["void"] == report.void != ""
    assert "<b>VOID: two copies" in report_html(report)
    assert 'class="ratios void"' in report_html(report)


def test_json_of_a_report_has_these_keys():
    content = json.loads(report_of().to_json())
    assert list(content) == ["schema_version", "setting", "machine", "subjects", "timing", "parity"]
    assert content["schema_version"] == 1
    assert list(content["setting"]) == [
        "model", "rules", "sites", "in_graphs", "trainable", "dtype", "inputs", "tokens", "notes",
    ]  # fmt: skip
    assert list(content["machine"]) == ["device", "processor", "cores", "threads", "system", "python", "torch"]
    assert [subject["name"] for subject in content["subjects"]] == [LB, OURS, PEFT]
    assert list(content["subjects"][0]) == ["name", "counts", "time"]
    assert content["subjects"][1]["counts"] == {
        "flops": 2_100_000, "saved_bytes": 1100, "peak_bytes": 5000, "aten_calls": 20,
    }  # fmt: skip
    ratio = ["ratio", "low", "high", "least", "processor", "seconds"]
    assert list(content["subjects"][1]["time"]) == list(content["timing"]["control"]) == ratio
    assert list(content["timing"]) == ["rounds", "discarded", "control", "void", "excess_removed"]
    assert content["timing"]["excess_removed"] == pytest.approx(0.8)


def test_excess_is_only_told_where_peft_takes_more_than_the_lower_bound():
    assert report_of([1.0, 1.0, 1.0, 0.99]).excess_removed is None


def test_pictures_show_every_subject_with_its_interval():
    shown = dict(panels(report_of([1.0, 1.0, 1.02, 1.1], [1.0, 1.0, 1.04, 1.1])))
    assert list(shown) == ["time", "FLOPs", "saved", "peak", "aten calls"]
    first = shown["time"][0]
    assert (first.name, first.low, first.high) == (OURS, 1.02, 1.04)
    page = report_html(report_of())
    assert page.count("<svg") == 5
    assert page.count("<circle") == 10
    assert 'aria-label="saved over the lower bound: lora_fx 1.100; PEFT 2.000"' in page
    assert "a &lt;CPU&gt;, 1 thread on 2 cores" in page
    assert not re.search(r"https?://", page)


def test_collections_look_at_new_things_only_and_at_all_afterwards():
    gc.unfreeze()  # what the test session has frozen at its start
    with frozen_heap():
        frozen = gc.get_freeze_count()
        assert frozen > 10_000
        with frozen_heap():  # a frozen object may still die when nothing refers to it
            assert gc.get_freeze_count() > 0.9 * frozen
        assert gc.get_freeze_count() > 0.9 * frozen
    assert gc.get_freeze_count() < frozen / 10  # Python 3.12 keeps a few hundred immortal ones apart
    gc.freeze()


# -- the whole


def test_counts_of_a_model_by_rules():
    model, inputs = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[tuple[int, int, str]] = []
    report = bench(model, "attention", inputs, BenchOptions(rounds=0), lambda *event: told.append(event))
    again = bench(model, "attention", inputs, BenchOptions(rounds=0))
    assert list(report.counts) == [LB, OURS, MODULES, FULL]
    assert report.counts == again.counts
    assert report.timing is None
    assert "time" not in str(report)
    assert (report.setting.sites, report.setting.tokens, report.setting.trainable) == (6, 10, 6 * 8 * 32)
    assert report.setting.notes == ()
    assert told[-1][:2] == (1000, 1000)
    assert [f"counting {name}, " in what for *_, what in told for name in (LB, FULL)].count(True) >= 2
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    flops, *_ = report.relative(OURS)
    assert flops > 1


def test_threads_and_random_state_are_given_back():
    (model, inputs), threads = small(), torch.get_num_threads()
    state = torch.get_rng_state()
    bench(model, "attention", inputs, BenchOptions(rounds=0, threads=2))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_times_of_a_model_by_rules_and_of_peft():
    pytest.importorskip("peft")
    model, inputs = small()
    report = bench(model, "attention", inputs, BenchOptions(peer="peft", rounds=2))
    assert list(report.counts) == [LB, OURS, MODULES, PEFT, FULL]
    assert list(report.timing.ratios) == list(report.counts)
    assert report.timing.rounds == 2
    assert report.parity < 1e-5


# -- the command line


@pytest.fixture
def tiny(tmp_path):
    """A model file that has all there is to a step."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "import torch\n"
        "def model():\n"
        "    layers = torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24)\n"
        "    return torch.nn.Sequential(*layers), (torch.ones(2, 32),)\n"
    )
    return f"{path}:model"


def test_text_of_the_command_line(tiny):
    result = run("bench", tiny, "all-linear", "--rounds", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Sequential · all-linear · 2 sites, 2 in graphs")
    assert [line.split("  ")[1] for line in lines[3:7]] == [LB, OURS, MODULES, FULL]
    assert any(line.startswith("  A/A control ") for line in lines)


def test_counts_of_the_command_line_are_the_same_each_time(tiny):
    words = ("bench", tiny, "all-linear", "--no-time", "--format", "json", "--dtype", "bfloat16", "--no-progress")
    first, second = run(*words), run(*words)
    assert first.stdout == second.stdout
    content = json.loads(first.stdout)
    assert content["timing"] is None
    assert content["setting"]["dtype"] == "bfloat16"
    assert first.stderr == ""


def test_page_of_the_command_line_goes_to_a_file(tiny, tmp_path):
    result = run("bench", tiny, "all-linear", "--rounds", 1, "--format", "html", "-o", tmp_path / "bench.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "bench.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_token_ids_are_made_for_a_directory_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    ).save_pretrained(tmp_path)
    result = run("bench", f"hf:{tmp_path}", "attention", "--no-time", "--tokens", "2x7", "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["setting"]["inputs"] == ["int64 [2, 7]"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Missing argument 'MODEL'"),
        ((SMALL,), "Missing argument 'RULES'"),
        ((SMALL, "attention", "--tokens", "many"), "--tokens many: write batch and length as 2x256"),
        ((SMALL, "attention", "--tokens", "2x8"), "--tokens is for models of transformers that take input_ids"),
        ((SMALL, "attention", "--peer", "other"), "'other' is not 'peft'"),
    ],
)
def test_misuse_is_told(words, told: str):
    result = run("bench", *words)
    assert result.exit_code == 2
    assert told in result.stderr


def test_missing_peft_is_told_with_what_to_install(tiny, monkeypatch):
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    result = run("bench", tiny, "all-linear", "--peer", "peft")
    assert result.exit_code == 2
    assert "comparing with PEFT needs it: pip install 'lora-fx[export]'" in result.stderr


def test_help_imports_no_torch():
    assert "torch" not in imported_by("bench", "--help")
