"""Records of runs that go on, and files that are not theirs: appended to, or left alone and told."""

from __future__ import annotations

import os

import pytest

import lora_fx
from lora_fx.training.lines import RecordFileError
from tests.support import runs, zoo


def test_a_run_that_goes_on_appends_and_counts_on(tmp_path):
    path, tuned = tmp_path / "run.jsonl", runs.adapted()
    for _ in range(2):
        with lora_fx.Recorder(tuned, path, every=4) as recorder:
            runs.train(tuned, recorder, runs.batches())
    whole = runs.adapted()
    with lora_fx.Recorder(whole, tmp_path / "whole.jsonl", every=4) as recorder:
        runs.train(whole, recorder, [*runs.batches(), *runs.batches()])
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("left", ["header", "line"])
def test_a_file_that_a_crash_has_cut_off_is_read_and_goes_on_as_if_it_were_whole(tmp_path, left):
    path, tuned = tmp_path / "run.jsonl", runs.adapted()
    recorder = lora_fx.Recorder(tuned, path, every=1)
    recorder.step(1.0)
    whole, lines = path.read_bytes(), path.read_bytes().splitlines(keepends=True)
    first = b"" if left == "header" else lines[0]
    for cut in range(1, len(lines[0] if left == "header" else lines[1]), 7):
        path.write_bytes(whole[: len(first) + cut])
        if left == "line":
            assert lora_fx.read_record(path).cut
        else:
            with pytest.raises(RecordFileError, match="no record of a training run yet"):
                lora_fx.read_record(path)
        lora_fx.Recorder(tuned, path, every=1).step(1.0)
        assert path.read_bytes() == whole


def test_steps_that_are_made_again_take_the_place_of_the_old_ones(tmp_path):
    path, tuned = tmp_path / "run.jsonl", runs.adapted()
    first = lora_fx.Recorder(tuned, path, every=1)
    for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0)):
        first.step(loss, step)
    again = lora_fx.Recorder(tuned, path, every=1)
    again.step(7.0, 2)
    record = lora_fx.read_record(path)
    assert record.losses() == [(1, 5.0), (2, 7.0)]
    assert record.replaced == 2
    assert "2 lines left out: the run went back to a checkpoint" in str(record)
    with path.open("rb") as file:
        assert len(file.readlines()) == 5


def test_file_of_other_adapters_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "run.jsonl"
    lora_fx.Recorder(runs.adapted(), path, every=1).step(1.0)
    before = path.read_bytes()
    other = runs.adapted(rules=zoo.rules("*.up", r=4))
    with pytest.raises(RecordFileError) as caught:
        lora_fx.Recorder(other, path, every=1)
    assert "another model; nothing was written" in str(caught.value)
    assert "  0.up: file r=2 scaling=2 rule rule 1, model r=4 scaling=4 rule rule 1" in str(caught.value)
    assert "  0.down: file r=2 scaling=2 rule rule 1, model has none" in str(caught.value)
    assert path.read_bytes() == before


def test_new_run_into_the_file_of_an_old_one_is_refused(tmp_path):
    path, tuned = tmp_path / "run.jsonl", runs.adapted()
    with lora_fx.Recorder(tuned, path) as recorder:
        runs.train(tuned, recorder, runs.batches())
    before = path.read_bytes()
    with pytest.raises(RecordFileError, match=r"up to step 12(.|\n)*untrained(.|\n)*a file of its own"):
        lora_fx.Recorder(runs.adapted(), path)
    assert path.read_bytes() == before
    lora_fx.Recorder(tuned, path)


@pytest.mark.parametrize(
    "content", [b"notes of mine", b"notes of mine\n", b'{"schema_version": 1}\n', b"{}", b"\xff\n"]
)
def test_files_of_other_kinds_are_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(RecordFileError, match="no record"):
        lora_fx.Recorder(runs.adapted(), path)
    assert path.read_bytes() == content


def test_places_where_no_file_can_be_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    places = {
        tmp_path: "directory",
        tmp_path / "file" / "run.jsonl": "reached|director",
        "a\0b": "no path",
        "x" * 5000: "reached",
    }
    for place, words in places.items():
        with pytest.raises(RecordFileError, match=words):
            lora_fx.Recorder(runs.adapted(), place)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordFileError, match="is a pipe"):
        lora_fx.Recorder(runs.adapted(), tmp_path / "pipe")


def test_a_second_run_that_writes_to_the_same_file_is_found(tmp_path):
    path = tmp_path / "run.jsonl"
    one, other = (lora_fx.Recorder(runs.adapted(), path, every=1) for _ in range(2))
    one.step(1.0)
    other.step(1.0)
    with pytest.raises(RecordFileError, match="something else writes to it"):
        one.step(1.0)


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    recorder = lora_fx.Recorder(runs.adapted(), path, every=1)
    recorder.step(1.0)
    before, write = path.read_bytes(), os.write

    def full(handle: int, content: bytes) -> int:
        if os.fstat(handle).st_size > len(before):
            raise OSError(28, "No space left on device")
        return write(handle, content[:20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RecordFileError, match="No space left on device"):
        recorder.step(1.0)
    assert path.read_bytes() == before
