"""Files of records: what is read, what is refused and how, and that reading needs no torch."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest

import lora_fx
from lora_fx.training.curves import chart, picked, smoothed, sparkline, thinned, ticks
from lora_fx.training.lines import RecordFileError, RecordLines, header_line
from tests.support import runs
from tests.support.docpages import ROOT


def test_reading_a_record_imports_no_torch(tmp_path):
    path = runs.made_up(tmp_path / "run.jsonl")
    code = (
        f"import sys, lora_fx; r = lora_fx.read_record({str(path)!r}); str(r); r.to_svg(); r.to_html(); r.to_json()\n"
        "assert not {'torch', 'numpy', 'networkx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_values_come_back_as_they_were_written(tmp_path):
    path = runs.written(
        tmp_path / "run.jsonl",
        [runs.line(3, "NaN", [0, 1.5, "NaN", "Infinity", 0, 0, 0, 2e9]), runs.line(4, None, [0] * 8)],
    )
    first, second = lora_fx.read_record(path).steps
    assert math.isnan(first.loss)
    assert [first.norms[1], first.norms[3], first.norms[7]] == [1.5, math.inf, 2e9]
    assert math.isnan(first.norms[2])
    assert second.loss is None


GOOD = runs.line(10, 1.0, [0.5] * 8)
ODD_LINES = {
    "no JSON": b"loss 3\n",
    "no object": b"[1, 2]\n",
    "another key": b'{"step": 1, "loss": 1.0, "mean_of": 1, "norms": [], "more": 1}\n',
    "a key twice": GOOD.replace(b'"loss"', b'"step": 1, "loss"'),
    "a Python NaN": runs.line(10, math.nan, [0.5] * 8),
    "a number beyond all": GOOD.replace(b"1.0", b"1e999"),
    "digits": GOOD.replace(b"1.0", b"9" * 5000),
    "true": runs.line(10, True, [0.5] * 8),
    "a word": runs.line(10, "low", [0.5] * 8),
    "a step below 0": runs.line(-1, 1.0, [0.5] * 8),
    "half a step": GOOD.replace(b"10", b"10.5", 1),
    "too few norms": runs.line(10, 1.0, [0.5] * 7),
    "a norm below 0": runs.line(10, 1.0, [-0.5] * 8),
    "norms that are no list": runs.line(10, 1.0, "12345678"),
    "depth": b"[" * 100_000 + b"\n",
    "no UTF-8": b"\xff\xfe\n",
    "an empty line": b"\n",
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_damaged_line_is_told_with_its_number(tmp_path, name):
    path = runs.written(tmp_path / "run.jsonl", [GOOD, ODD_LINES[name], GOOD])
    with pytest.raises(RecordFileError, match=r"run.jsonl: line 3 "):
        lora_fx.read_record(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"schema_version": 1', b'"schema_version": 2', "no record of a training run"),
        (b'"model": "Llama"', b'"model": 3', "header.model must be a text"),
        (b'"r": 8', b'"r": -8', r"header.sites\[0\].r must be a whole number"),
        (b'"layer": "layers.0", ', b"", r"header.sites\[0\] lacks 'layer'"),
        (b"layers.1.q_proj", b"layers.0.q_proj", "a site twice"),
    ],
)
def test_damaged_header_is_told(tmp_path, old, new, words):
    path = tmp_path / "run.jsonl"
    path.write_bytes(header_line("Llama", "0.1.0", runs.sites()).replace(old, new))
    with pytest.raises(RecordFileError, match=words):
        lora_fx.read_record(path)


def test_missing_empty_and_siteless_files_are_told(tmp_path):
    with pytest.raises(RecordFileError, match="no such file"):
        lora_fx.read_record(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecordFileError, match="is empty"):
        lora_fx.read_record(tmp_path / "empty.jsonl")
    (tmp_path / "siteless.jsonl").write_bytes(header_line("Llama", "0.1.0", []))
    with pytest.raises(RecordFileError, match="has no sites"):
        lora_fx.read_record(tmp_path / "siteless.jsonl")


def test_whatever_is_changed_in_a_file_it_is_read_or_refused_in_our_words(tmp_path):
    path = runs.made_up(tmp_path / "run.jsonl", 5)
    content, chance = path.read_bytes(), random.Random(3)
    read = 0
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 3))):
            start = chance.randrange(len(changed))
            changed[start : start + chance.choice((0, 1, 5))] = chance.randbytes(chance.choice((0, 1, 2)))
        path.write_bytes(bytes(changed))
        try:
            record = lora_fx.read_record(path)
        except RecordFileError:
            continue
        read += 1
        assert all((str(record), record.to_svg(), record.to_html(), json.loads(record.to_json())))
    assert 30 < read < 470


def test_file_is_read_as_it_grows_each_line_once(tmp_path):
    path = runs.made_up(tmp_path / "run.jsonl", 10)
    content = path.read_bytes()
    lines = RecordLines(path)
    for end in (len(content) - 300, len(content) - 60, len(content)):
        path.write_bytes(content[:end])
        assert lines.read() == RecordLines(path).read()
    assert lines.size == len(content)


def test_a_file_that_begins_anew_or_is_another_is_read_anew(tmp_path):
    path = runs.made_up(tmp_path / "run.jsonl", 10)
    lines = RecordLines(path)
    lines.read()
    path.write_bytes(header_line("Llama", "0.1.0", runs.sites()) + GOOD)
    assert len(lines.read().steps) == 1
    runs.made_up(tmp_path / "other.jsonl", 30).replace(path)
    assert len(lines.read().steps) == 30


# -- curves


def test_thinned_points_keep_every_peak_and_are_always_the_same():
    points = [(step, math.sin(step / 500)) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    points[777] = (777, math.nan)
    kept = thinned(points, 1000)
    assert len(kept) <= 1000
    assert (54_321, 9.0) in kept
    assert kept == sorted(kept) == thinned(points, 1000)
    assert thinned(points[:500], 1000) == points[:500]


def test_smoothing_has_no_bias_at_its_beginning_and_follows():
    means = smoothed([(step, 5.0) for step in range(50)])
    assert [value for _, value in means] == pytest.approx([5.0] * 50)
    (_, first), *_, (_, last) = smoothed([(step, float(step)) for step in range(100)])
    assert first == 0
    assert 95 < last < 99
    assert smoothed([(1, math.nan)]) == []


def test_positions_that_are_picked_are_spread_and_have_both_ends():
    assert picked(5, 12) == [0, 1, 2, 3, 4]
    assert picked(100, 4) == [0, 33, 66, 99]
    assert picked(0, 12) == []


def test_curves_as_text():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 1], 8) == "▁▁"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([0, math.nan, 7], 8) == "▁×█"
    assert sparkline([], 8) == ""
    assert chart([0, 15], 8, 2) == [" █", "▁█"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 2.47), (10, 40_000), (-3, 3), (1e-9, 2e-9), (0, 1e99)])
def test_ticks_are_few_and_round(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low <= tick <= high for tick in found)
    assert all(float(f"{tick:.2g}") == pytest.approx(tick) or high > 10_000 for tick in found)
    assert ticks(2, 2) == [2]
