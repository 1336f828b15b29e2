"""`lora-fx watch`: formats, widths, files of others, and records that grow."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

import lora_fx
from lora_fx.cli import watch
from lora_fx.training.lines import RecordLines
from tests.cli.test_cli import imported_by
from tests.support import runs
from tests.support.clitools import golden, run


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return runs.made_up(tmp_path / "run.jsonl")


@pytest.mark.parametrize("columns", [60, 160])
def test_summary_fits_narrow_and_wide_terminals(record, columns):
    result = run("watch", "run.jsonl", columns=columns)
    assert result.exit_code == 0, result.output
    golden(f"watch-{columns}.txt", result.stdout)


def test_every_format_is_what_the_record_gives(record, tmp_path):
    read = lora_fx.read_record(record)
    assert json.loads(run("watch", record, "--format", "json").stdout) == json.loads(read.to_json())
    assert run("watch", record, "--format", "html", "-o", tmp_path / "run.html").exit_code == 0
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == read.to_html() + "\n"
    assert ElementTree.fromstring(run("watch", record, "--format", "svg").stdout) is not None


def test_torch_is_not_imported(record):
    assert not imported_by("watch", str(record)) & {"torch", "numpy", "networkx", "safetensors"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"hello\n", "no record of a training run"),
        (b"[" * 1_000_000, "no record of a training run"),
        (runs.line(1, 1.0, [1.0]), "no record of a training run"),
    ],
)
def test_files_of_others_end_with_2_and_say_why(tmp_path, content, words):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_bytes(content)
    result = run("watch", path)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "lora-fx help RecordFileError" in result.stderr


def test_damaged_line_ends_with_2_and_is_told(record):
    record.write_bytes(record.read_bytes().replace(b'"step": 30', b'"step": -3'))
    result = run("watch", record)
    assert result.exit_code == 2
    assert "line 4 has a step that is no whole number" in result.stderr


def test_a_directory_ends_with_2(tmp_path):
    assert run("watch", tmp_path).exit_code == 2


def grow(record, monkeypatch, *more):
    """Let each look at a record find one more thing, and the last one an interruption."""
    coming = iter(more)

    def sleep(seconds: float) -> None:
        content = next(coming, None)
        if content is None:
            raise KeyboardInterrupt
        with record.open("ab") as file:
            file.write(content)

    monkeypatch.setattr(watch.time, "sleep", sleep)


def test_record_is_shown_anew_when_it_has_grown_by_a_whole_line(record, monkeypatch):
    line = runs.line(410, 0.1, [0.5] * 8)
    grow(record, monkeypatch, b"", line[:20], line[20:], b"")
    result = run("watch", record, "--follow")
    assert result.exit_code == 0, result.output
    assert [word for word in result.stdout.split() if word in ("400", "410")] == ["400", "410"]
    assert "\x1b" not in result.stdout


def test_terminal_shows_the_new_in_place_of_the_old(record, monkeypatch, capsys):
    grow(record, monkeypatch, runs.line(410, 0.1, [0.5] * 8))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = RecordLines(record)
    lines.read()
    with pytest.raises(KeyboardInterrupt):
        watch.show_growth(lines, 1.0, lambda record: print(record.steps[-1].step))
    assert capsys.readouterr().out == "\x1b[H\x1b[2J\x1b[3J410\n"


def test_record_that_is_not_there_yet_is_waited_for(tmp_path, monkeypatch):
    def sleep(seconds: float) -> None:
        if (tmp_path / "run.jsonl").exists():
            raise KeyboardInterrupt
        runs.made_up(tmp_path / "run.jsonl")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    result = run("watch", tmp_path / "run.jsonl", "--follow")
    assert result.exit_code == 0, result.output
    assert "waiting for" in result.stderr
    assert "step 400" in result.stdout


def test_record_that_is_damaged_while_it_is_followed_ends_with_2(record, monkeypatch):
    grow(record, monkeypatch, b"nonsense\n")
    result = run("watch", record, "--follow")
    assert result.exit_code == 2
    assert "line 42 is not JSON" in result.stderr
